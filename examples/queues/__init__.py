"""The jobs of a queue as operations: the same application with arq, with SAQ and with Celery."""
