"use strict";
// Names, routes and messages come from requests, and are hostile: they become text, and encoded parts of paths.
const $ = (id) => document.getElementById(id);
const PATIENCE = 15000;
const LOOK_EVERY = 1000;
const TYPE_EVERY = 120;
const rows = new Map();      // the rows of the table of what runs, by id
const pids = new Map();      // the process of each worker, by its name

// Only what has changed: what is selected stays selected, and screen readers are not told again.
const put = (element, text) => { if (element.textContent !== text) element.textContent = text; };
const pathOf = (id) => `${setup.operations}/${encodeURIComponent(id)}`;
const titleOf = (operation) => (operation.route ? `${operation.method ?? ""} ${operation.route}` : operation.name ?? operation.id);
const workerOf = (operation) => String(pids.get(operation.worker) ?? operation.worker);

async function ask(path, options) {
  const response = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE), ...options });
  return [response, await response.json()];
}

async function ask200(path) {
  const [response, answer] = await ask(path);
  if (!response.ok) throw new Error(answer.detail);
  return answer;
}

async function stopIt(operation) {
  const options = {
    method: "POST", headers: { "content-type": "application/json" },
    body: JSON.stringify({ message: "stopped on the page" }),
  };
  try {
    const [response, answer] = await ask(`${pathOf(operation.id)}/cancel`, options);
    const by = `as worker ${response.headers.get("x-worker")} says`;
    put($("stopped"), `${titleOf(operation)} on worker ${workerOf(operation)}: ${answer.outcome ?? answer.detail}, ${by}`);
  } catch {
    put($("stopped"), `${titleOf(operation)}: the server does not answer`);
  }
}

// What runs

async function look() {
  try {
    const found = await ask200(`${setup.operations}/`);
    if (found.operations.some((operation) => !pids.has(operation.worker))) {
      const answer = await ask200(`${setup.operations}/workers`);
      answer.workers.forEach((worker) => pids.set(worker.name, worker.pid));
    }
    showRows(found.operations.filter((operation) => !operation.route?.startsWith(`${setup.operations}/`)));
    const silent = found.unreachable.length;
    put($("missing"), silent ? `${silent} worker(s) do not answer, and theirs are missing` : "");
  } catch {
    put($("missing"), "The server does not answer: this is old");
  }
  setTimeout(look, document.hidden ? 5 * LOOK_EVERY : LOOK_EVERY);
}

function showRows(operations) {
  const ids = new Set(operations.map((operation) => operation.id));
  for (const [id, row] of rows) {
    if (ids.has(id)) continue;
    if (row.element.contains(document.activeElement)) $("running-title").focus();
    row.element.remove();
    rows.delete(id);
  }
  for (const operation of operations) {
    if (!rows.has(operation.id)) rows.set(operation.id, new Row());
    rows.get(operation.id).show(operation);
  }
  $("nothing").hidden = operations.length > 0;
}

class Row {
  constructor() {
    this.element = stamp("operation");
    this.button = this.element.querySelector("button");
    this.button.onclick = () => stopIt(this.operation);
    $("running").append(this.element);
  }

  show(operation) {
    this.operation = operation;
    const { done, total } = operation.progress?.metadata ?? {};
    const bar = this.element.querySelector("progress");
    bar.hidden = !total;
    if (total) Object.assign(bar, { max: total, value: done });
    this.button.setAttribute("aria-label", `Stop ${titleOf(operation)} on worker ${workerOf(operation)}`);
    const texts = {
      what: titleOf(operation), kind: operation.kind, worker: workerOf(operation), state: operation.state,
      age: seconds(operation.elapsed * 1000),
    };
    for (const [name, text] of Object.entries(texts)) put(this.element.querySelector(`[data-is=${name}]`), text);
  }
}

// A report in the background

function showReport(state, tone) {
  put($("report-state"), state);
  $("report-state").className = `chip ${tone}`;
}

async function startReport() {
  $("report-start").disabled = true;
  for (const name of ["answer", "rows", "result"]) put($(`report-${name}`), "–");
  $("report-bar").value = 0;
  try {
    const [response, operation] = await ask("/reports", { method: "POST" });
    if (response.status !== 202) throw new Error(operation.detail);
    put($("report-answer"), `${response.status} by worker ${response.headers.get("x-worker")}`);
    follow(response.headers.get("location"), operation);
  } catch {
    showReport("not started", "bad");
    $("report-start").disabled = false;
  }
}

function follow(path, operation) {
  const events = new EventSource(`${path}/events`);
  const over = () => {
    events.close();
    $("report-start").disabled = false;
    $("report-stop").disabled = true;
  };
  showReport(operation.state, "good");
  $("report-stop").disabled = false;
  $("report-stop").onclick = () => stopIt(operation);
  events.addEventListener("state", (event) => showReport(JSON.parse(event.data).state, "good"));
  events.addEventListener("progress", (event) => {
    const { done, total } = JSON.parse(event.data).metadata;
    Object.assign($("report-bar"), { max: total, value: done });
    put($("report-rows"), `${whole(done)} of ${whole(total)}`);
  });
  events.addEventListener("end", async (event) => {
    over();
    const { state, reason } = JSON.parse(event.data);
    showReport(reason ? `${state}: ${reason}` : state, state === "finished" ? "good" : "bad");
    try {
      const [response, result] = await ask(`${path}/result`);
      put($("report-result"), `${response.status}: ${response.ok ? largestOf(result) : result.detail}`);
    } catch {
      put($("report-result"), "the server does not answer");
    }
  });
  // While it is connecting it goes on by itself; what is closed was refused.
  events.onerror = () => {
    if (events.readyState !== EventSource.CLOSED) return;
    over();
    showReport("the server does not know it any more", "bad");
  };
}

function largestOf(result) {
  const [shop, [cents]] = Object.entries(result).sort((one, other) => other[1][0] - one[1][0])[0];
  return `the largest sale was ${(cents / 100).toFixed(2)} in ${shop}`;
}

// A search with every keystroke

class Search {
  // A browser opens six connections to a host. With `most` requests at a time, some are left for the rest of the page.
  constructor(path, title, side, most) {
    Object.assign(this, { path, most, sent: 0, answered: 0, superseded: 0, busy: 0, newest: 0, queue: [], read: new Map() });
    this.element = stamp("search");
    this.element.dataset.lane = side;
    this.element.querySelector("h3").textContent = title;
    // One of them is told aloud: the other one says the same, later.
    if (side === "with") this.element.querySelector("[data-is=answer]").setAttribute("role", "status");
    $("searches").append(this.element);
    this.show();
  }

  type(text) {
    this.queue.push([text, ++this.sent]);
    this.next();
  }

  next() {
    while (this.queue.length && this.busy < this.most) this.send(...this.queue.shift());
    this.show();
  }

  async send(text, number) {
    this.busy++;
    const id = `search-${Date.now().toString(36)}-${++started}`;
    lanes.set(id, this);
    try {
      const headers = { "x-run": id, user };
      const [response, found] = await ask(`${this.path}?text=${encodeURIComponent(text)}`, { headers });
      if (response.status === 499) this.superseded++;
      else this.take(text, number, response, found);
    } catch {
      this.answer("the server does not answer");
    }
    this.busy--;
    this.next();
  }

  take(text, number, response, found) {
    if (response.ok) this.answered++;
    if (number < this.newest) return;
    this.newest = number;
    const words = Object.entries(found).map(([word, count]) => `${word} ${whole(count)}`);
    this.answer(`“${text}”: ${response.ok ? words.join(", ") || "no such word" : response.status}`);
  }

  answer(text) {
    put(this.element.querySelector("[data-is=answer]"), text);
  }

  update(run) {
    this.read.set(run.id, run.done);
    this.show();
  }

  show() {
    const read = [...this.read.values()].reduce((sum, words) => sum + words, 0);
    const texts = { sent: this.sent, answered: this.answered, superseded: this.superseded, read };
    for (const [name, count] of Object.entries(texts)) put(this.element.querySelector(`[data-is=${name}]`), whole(count));
  }
}

const user = `tab-${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`;
const searches = [
  new Search("/search", "With latest_only()", "with", 2),
  new Search("/plain/search", "Without", "without", 1),
];

function typed() {
  const text = $("search-text").value.trim();
  if (text) searches.forEach((search) => search.type(text));
}

function typeForMe() {
  const input = $("search-text"), typing = $("search-type");
  typing.disabled = true;
  [...setup.word].forEach((_, place) => setTimeout(() => {
    input.value = setup.word.slice(0, place + 1);
    typed();
    typing.disabled = place + 1 < setup.word.length;
  }, place * TYPE_EVERY));
}

$("search-text").oninput = typed;
$("search-text").placeholder = `for example ${setup.word}`;
$("search-type").onclick = typeForMe;
$("report-start").onclick = startReport;
look();
