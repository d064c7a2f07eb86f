"use strict";
const POLL_MS = 2000, FIRST_POLL_MS = 800, PATIENCE_MS = 6000, KEY = "hexgen-vllm-key";
const $ = (id) => document.getElementById(id);
let last = null, heardAt = 0, timer = 0;

// Words and numbers. Whatever came from a client is only ever set as text.
const known = (x) => x !== null && x !== undefined;
const count = (x) => known(x) ? Math.round(x).toLocaleString("en") : "–";
const short = (x) => !known(x) ? "–" : x >= 1e6 ? (x / 1e6).toFixed(1) + " M" : x >= 1e4 ? Math.round(x / 1e3) + " k" : count(x);
const percent = (x, digits = 0) => known(x) ? (100 * x).toFixed(digits) + " %" : "–";
function seconds(x) {
  if (!known(x)) return "–";
  const sign = x < 0 ? "−" : "", s = Math.abs(x);
  if (s < 0.0005) return "0 s";
  if (s < 0.0995) return sign + Math.round(1000 * s) + " ms";
  if (s < 9.95) return sign + s.toFixed(1) + " s";
  if (s < 119.5) return sign + Math.round(s) + " s";
  if (s < 7170) return sign + Math.round(s / 60) + " min";
  return sign + (s < 172800 ? Math.round(s / 3600) + " h" : Math.round(s / 86400) + " d");
}
const slackClass = (s) => !known(s) ? "" : s < 0 ? "bad" : s < 1 ? "warn" : "";

function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}
function make(parent, tag, className = "") {
  const node = parent.appendChild(document.createElement(tag));
  node.className = className;
  return node;
}
function fit(parent, n, tag) {
  while (parent.children.length > n) parent.lastChild.remove();
  while (parent.children.length < n) make(parent, tag);
}
function figure(id, main, more = "", className = "") {
  const node = $(id);
  node.className = className;
  if (!node.firstElementChild) { node.textContent = ""; make(node, "span"); make(node, "small"); }
  text(node.firstElementChild, main);
  text(node.lastElementChild, more);
}

// A cell is a text, or {text, c: class, share: of a meter, dot: class of a state, title}.
function cell(td, given) {
  const it = typeof given === "object" ? given : { text: given };
  const want = (it.c || "") + ("share" in it ? " meter" : "");
  if (td.className !== want) td.className = want;
  if (it.title) td.title = it.title;
  if ("share" in it) {
    const bar = td.querySelector("u") || make(make(td, "div"), "u");
    bar.parentNode.hidden = !known(it.share);
    bar.style.width = 100 * Math.min(it.share || 0, 1) + "%";
  } else if ("parts" in it) {
    const bar = td.firstElementChild || make(td, "div");
    stack(bar, PARTS.map((name) => [name, it.parts[name]]), it.total);
    td.title = PARTS.filter((name) => it.parts[name] > 0).map((name) => name + " " + seconds(it.parts[name])).join(", ");
  } else if (it.dot) {
    if (!td.firstElementChild) { make(td, "i"); make(td, "span"); }
    td.classList.add(it.dot);
    text(td.lastElementChild, it.text);
  } else {
    text(td, it.text);
  }
}
function table(id, rows, emptyId) {
  const body = $(id);
  fit(body, rows.length, "tr");
  rows.forEach((cells, i) => {
    fit(body.children[i], cells.length, "td");
    cells.forEach((one, j) => cell(body.children[i].children[j], one));
  });
  body.parentNode.hidden = rows.length === 0;
  $(emptyId).hidden = rows.length > 0;
}
const PARTS = ["queue", "retries", "prefill", "decode", "engine", "client"];
function stack(node, parts, total) {
  fit(node, parts.length, "u");
  parts.forEach(([name, s], i) => {
    node.children[i].className = name;
    node.children[i].style.width = 100 * s / Math.max(total, 1e-9) + "%";
  });
}
const num = (t, c = "") => ({ text: t, c: "n " + c });
const mono = (t) => ({ text: t, c: "id", title: t });

function bars(id, columns) {
  const box = $(id), most = Math.max(1, ...columns.map((c) => c.parts.reduce((a, p) => a + p.n, 0)));
  fit(box, columns.length, "div");
  box.dataset.most = "most: " + most;
  columns.forEach((column, i) => {
    const node = box.children[i], total = column.parts.reduce((a, p) => a + p.n, 0);
    node.title = column.title;
    if (!node.firstElementChild) { make(node, "b"); column.parts.forEach(() => make(node, "u")); }
    text(node.firstElementChild, column.label && total ? String(total) : "");
    column.parts.forEach((part, j) => {
      const bar = node.children[j + 1];
      bar.className = part.c;
      bar.style.height = part.n ? Math.max(1, 76 * part.n / most) + "px" : "0";
    });
  });
}

function showFigures(d, before) {
  const ended = { "on-time": 0, late: 0, failed: 0 };
  for (const p of d.ended.periods) for (const k in ended) ended[k] += p[k];
  const all = ended["on-time"] + ended.late + ended.failed, share = all ? ended["on-time"] / all : null;
  figure("on-time", percent(share, 1), "", !all ? "" : share < .9 ? "bad" : share < .99 ? "warn" : "");
  const w = d.workflows, c = d.calls;
  figure("at-risk", count(w.at_risk), [w.late ? count(w.late) + " late" : "", w.demoted ? count(w.demoted) + " demoted" : ""]
    .filter(Boolean).join(", "), w.late ? "bad" : w.at_risk ? "warn" : "");
  figure("open-workflows", count(w.open));
  figure("open-calls", count(c.open));
  figure("queue", count(c.held), c.held ? short(c.held_tokens) + " tokens, " + seconds(c.oldest_held_s) : "");
  const failed = Object.values(c.failed).reduce((a, n) => a + n, 0);
  const dt = before ? d.up_s - before.up_s : 0;
  figure("rate", dt > 0 ? ((c.answered - before.calls.answered) / dt).toFixed(1) + "/s" : "–", count(c.answered));
  figure("failures", count(failed), c.retries ? count(c.retries) + " retried" : "");
  $("failures").title = Object.entries(c.failed).map(([why, n]) => why + ": " + n).join("\n");
  for (const k in ended) text($("ended-" + k), count(ended[k]));
}

function showHistory(d) {
  const n = d.ended.periods.length;
  bars("history", d.ended.periods.map((p, i) => ({
    title: `${seconds((n - 1 - i) * d.ended.period_s)} ago: ${p["on-time"]} on time, ${p.late} late, ${p.failed} failed`,
    parts: [{ n: p.failed, c: "failed" }, { n: p.late, c: "late" }, { n: p["on-time"], c: "on" }],
  })));
}

function showSlack(d) {
  const bounds = d.slack.bounds_s, minus = (x) => String(x).replace("-", "−");
  const names = d.slack.calls.map((_, i) => i === 0 ? "< " + minus(bounds[0])
    : i === bounds.length ? "> " + minus(bounds[i - 1]) : "≤ " + minus(bounds[i]));
  bars("slack", d.slack.calls.map((n, i) => ({
    title: `${n} calls, slack ${names[i]} s`, label: true,
    parts: [{ n, c: i < bounds.length && bounds[i] <= 0 ? "late" : i < bounds.length && bounds[i] <= 1 ? "tight" : "on" }],
  })));
  fit($("slack-axis"), names.length, "span");
  names.forEach((name, i) => text($("slack-axis").children[i], name));
  const late = d.slack.calls.reduce((a, n, i) => a + (i < bounds.length && bounds[i] <= 0 ? n : 0), 0);
  const all = d.slack.calls.reduce((a, n) => a + n, 0);
  text($("slack-note"), all ? `${count(all)} open, ${count(late)} in workflows likely to end late` : "No call is open.");
}

function engineRow(e) {
  const busy = e.slots ? e.calls / e.slots : null;
  const dot = { ready: "good", down: "bad" }[e.state] || "warn";
  return [
    mono(e.name), { text: e.state + (e.state !== "ready" && e.reason ? ": " + e.reason : ""), dot, title: e.reason || e.state }, e.kind || "–", e.models.join(", ") || "–",
    num(count(e.calls) + (e.slots ? " / " + count(e.slots) : "")), { share: busy, c: busy > 1 ? "warn" : "" },
    num(count(e.waiting)), num(percent(e.kv_usage)), { share: e.kv_usage, c: e.kv_usage > .95 ? "bad" : e.kv_usage > .85 ? "warn" : "" },
    num(short(e.tokens)), num(known(e.step_s) ? (1000 * e.step_s).toFixed(1) : "–"),
    num(short(e.prefill_tokens_per_s)), { ...num(percent(e.fit_error)), title: known(e.fit_age_s) ? `last learned ${seconds(e.fit_age_s)} ago` : "" }, num(count(e.preemptions)),
  ];
}
function riskRow(w) {
  return [mono(w.id), num(seconds(w.slack_s), slackClass(w.slack_s)), num(seconds(w.deadline_in_s), slackClass(w.deadline_in_s)),
    w.type, w.stage, w.engine || (w.demoted ? "queue, demoted" : "queue")];
}
function typeRow(t) {
  const all = t["on-time"] + t.late + t.failed, share = t["on-time"] / all;
  const c = share < .9 ? "bad" : share < .99 ? "warn" : "";
  return [t.type, num(count(all)), num(count(t["on-time"])), num(count(t.late)), num(count(t.failed)), num(percent(share), c), { share, c },
    num(seconds(t.took_median_s) + ", " + seconds(t.took_tail_s)), num(seconds(t.ttft_median_s) + ", " + seconds(t.ttft_tail_s))];
}
function tenantRow(o, all) {
  const share = all ? (o.prompt + o.output) / all : null;
  return [mono(o.tenant), num(count(o.running)), num(count(o.held)), num(o.held ? seconds(o.oldest_held_s) : "–"),
    num(count(o.at_risk), o.at_risk ? "warn" : ""), num(count(o.answered)), num(count(o.failed), o.failed ? "warn" : ""),
    num(short(o.prompt)), num(percent(o.prompt ? o.cached / o.prompt : null)), num(short(o.output)), num(percent(share)), { share, c: "" }];
}
function decisionRow(d) {
  const slack = known(d.late_s) ? -d.late_s : null;
  return [num(seconds(d.age_s)), mono(d.request), d.engine || { text: "refused", c: "bad" }, d.why,
    num(d.demoted ? "demoted" : seconds(slack), d.demoted ? "soft" : slackClass(slack)), num(seconds(d.finish_in_s)), num(seconds(d.tail_s)),
    num(count(d.uncached_tokens)), num(count(d.expected_output_tokens))];
}
const outcomeDot = { "on-time": "good", late: "bad", failed: "bad" };
function endedRow(r) {
  return [num(seconds(r.age_s)), mono(r.id), r.type, { text: r.outcome, dot: outcomeDot[r.outcome] || "warn" },
    num(seconds(r.took_s)), num(seconds(r.slack_s), slackClass(r.slack_s)), num(count(r.calls)),
    { parts: r.parts, total: r.took_s, c: "parts" }];
}

// One workflow: a bar for each call on the axis of its time.
function showAccount(a) {
  text($("account-name"), `${a.workflow}: ${a.outcome}, took ${seconds(a.took_s)}` +
    (known(a.deadline_s) ? ` of ${seconds(a.deadline_s)}` : ""));
  // A deadline far off would make every bar a hair.
  const near = known(a.deadline_s) && a.deadline_s < 2 * a.took_s;
  const end = Math.max(a.took_s, near ? a.deadline_s : 0, 1e-3), box = $("account-calls");
  fit(box, a.calls.length, "div");
  a.calls.forEach((g, i) => {
    const row = box.children[i];
    if (!row.firstElementChild) { make(row, "span"); make(row, "div"); make(row, "em"); }
    text(row.children[0], `${g.stage} on ${g.engine || "no engine"}`);
    const sent = known(g.sent_s) ? g.sent_s : g.ended_s, placed = known(g.placed_s) ? g.placed_s : sent;
    const first = known(g.first_token_s) && g.first_token_s >= sent ? g.first_token_s : sent;
    stack(row.children[1], [["gap", g.came_s], ["queue", placed - g.came_s], ["retries", sent - placed],
      ["prefill", first - sent], ["decode", g.ended_s - first]], end);
    text(row.children[2], `${seconds(g.ended_s - g.came_s)}, ${g.outcome}${g.tries > 1 ? ", " + g.tries + " tries" : ""}: ${g.why}`);
    row.title = `request ${g.request_id}: ${count(g.prompt_tokens)} prompt tokens, ${count(g.cached_tokens)} of them cached, ${count(g.output_tokens)} written`;
    row.className = g.on_path ? "decided" : "";
  });
  fit($("account-axis"), 5, "span");
  for (let i = 0; i < 5; i++) text($("account-axis").children[i], seconds(end * i / 4));
  text($("account-note"), "In bold: the calls that decided how long it took." +
    (known(a.deadline_s) ? ` The axis ends ${end > a.deadline_s || !near ? "with its last call; it was due after " + seconds(a.deadline_s) : "at its deadline"}.` : ""));
  $("account").hidden = false;
}
async function choose(id) {
  const key = sessionStorage.getItem(KEY);
  const answer = await fetch("explain?session_id=" + encodeURIComponent(id),
    { headers: key ? { Authorization: "Bearer " + key } : {}, cache: "no-store" });
  if (answer.ok) return showAccount(await answer.json());
  $("account").hidden = false;
  $("account-calls").textContent = "";
  text($("account-name"), id);
  text($("account-note"), "The router does not remember its calls any more.");
}

function routers(r) {
  if (!r) return "";
  return r.store ? `, ${count(r.others)} other router${r.others === 1 ? "" : "s"}` : ", other routers unknown: no store";
}

function show(d) {
  const before = last && last.up_s < d.up_s ? last : null;
  text($("about"), `policy ${d.policy}, version ${d.version}, up ${seconds(d.up_s)}${routers(d.replicas)}`);
  showFigures(d, before);
  showHistory(d);
  showSlack(d);
  table("engines", d.engines.map(engineRow), "no-engines");
  table("risks", d.workflows.shown.map(riskRow), "no-risks");
  table("recent", d.recent.map(endedRow), "no-recent");
  d.recent.forEach((r, i) => { $("recent").children[i].onclick = () => choose(r.id).catch(() => {}); });
  table("types", d.ended.types.map(typeRow), "no-types");
  const tokens = d.tenants.reduce((a, o) => a + o.prompt + o.output, 0);
  table("tenants", d.tenants.map((o) => tenantRow(o, tokens)), "no-tenants");
  table("decisions", d.decisions.map(decisionRow), "no-decisions");
  const hidden = d.workflows.at_risk - d.workflows.shown.length;
  text($("risks-note"), hidden > 0 ? `and ${count(hidden)} more` : "");
  const up = d.engines.filter((e) => e.state === "ready").length;
  status(d.state === "ready" && up === d.engines.length ? "good" : d.state === "ready" ? "warn" : "bad",
    `${d.state}, ${up} of ${d.engines.length} engines`);
  if (!last || last.up_s !== d.up_s) last = d;
  $("content").hidden = false;
}

function status(className, words) {
  $("status").className = className;
  text($("status-text"), words);
}
function askForKey(refused) {
  $("content").hidden = true;
  $("key-form").hidden = false;
  $("key-note").className = refused ? "bad" : "";
  if (refused) text($("key-note"), "The router does not take this key.");
  status("warn", "a key is needed");
  $("key").focus();
}
function failed(words) {
  document.body.classList.add("stale");
  status("bad", words + (heardAt ? `, last heard ${seconds((Date.now() - heardAt) / 1000)} ago` : ""));
}

async function poll() {
  clearTimeout(timer);
  const first = !heardAt, key = sessionStorage.getItem(KEY);
  try {
    const answer = await fetch("ui/data", {
      headers: key ? { Authorization: "Bearer " + key } : {}, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS),
    });
    if (answer.status === 401 || answer.status === 403) {
      sessionStorage.removeItem(KEY);
      return askForKey(Boolean(key));
    }
    if (!answer.ok) throw new Error("status " + answer.status);
    show(await answer.json());
    heardAt = Date.now();
    document.body.classList.remove("stale");
  } catch (error) {
    failed(error instanceof SyntaxError || /^status/.test(error.message) ? "the router answers wrongly" : "no answer from the router");
  }
  if (!document.hidden) timer = setTimeout(poll, first ? FIRST_POLL_MS : POLL_MS);
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  if (!key) return;
  sessionStorage.setItem(KEY, key);
  $("key").value = "";
  $("key-form").hidden = true;
  poll();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && $("key-form").hidden) poll();
});
poll();
