"use strict"
// What the page shows is `shown`: embedded, or, where that is null, asked of the server that follows a run.
const page = document.getElementById("page")
let shown = JSON.parse(document.getElementById("data").textContent)
const live = shown === null
const view = { kind: "", failures: "", samples: "", sort: "place", beside: false, count: 30, failed: 20, open: new Set() }
const SAME_SHOWN = 3 // unchanged lines around a change; the others are folded

function element(name, more = {}, ...children) {
  const made = document.createElement(name)
  for (const [key, value] of Object.entries(more)) {
    if (key === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act)
    else if (value !== null && value !== false) made.setAttribute(key === "cls" ? "class" : key, value === true ? "" : value)
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined))
  return made
}

// The parts of the page.

function head() {
  const dark = document.documentElement.dataset.colours === "dark"
  return element("header", {}, element("h1", {}, shown.name), element("p", {}, shown.about),
    element("button", { type: "button", id: "colours", "aria-pressed": String(dark), title: "d", on: { click: switchColours } }, "dark"))
}

function progress() {
  if (shown.state === "finished") return null
  const { done, total, line } = shown.progress
  const bar = total ? { value: Math.min(done, total), max: total } : {}
  return element("section", { cls: "run", role: "status" }, element("progress", { ...bar, "aria-label": "records settled" }), element("p", {}, line))
}

function tiles() {
  const made = shown.tiles.map(([name, value]) => element("div", { cls: name === "failed" && value !== "0" ? "bad" : null }, element("dt", {}, name), element("dd", {}, value)))
  return element("dl", { cls: "tiles" }, made)
}

function table(columns, rows) {
  const headings = columns.map((name) => element("th", { scope: "col" }, name))
  const body = rows.map((row) => element("tr", {}, row.map((cell, n) => columns.length ? element("td", {}, cell) : element(n ? "td" : "th", n ? {} : { scope: "row" }, cell))))
  return element("div", { cls: "scroll" }, element("table", {}, columns.length ? element("thead", {}, element("tr", {}, headings)) : null, element("tbody", {}, body)))
}

function charts() {
  if (!shown.charts.length) return []
  const made = shown.charts.map(([title, svg, columns, rows]) => {
    const section = element("section", { cls: "chart" }, element("h3", {}, title))
    section.insertAdjacentHTML("beforeend", svg)
    section.append(element("details", {}, element("summary", {}, "As a table"), table(columns, rows)))
    return section
  })
  return [element("h2", {}, "How it went"), element("div", { cls: "charts" }, made)]
}

function failures() {
  if (!shown.classes.length) return []
  const all = shown.classes.reduce((sum, [, count]) => sum + count, 0)
  const options = [element("option", { value: "" }, `all classes (${all})`), ...shown.classes.map(([kind, count]) => element("option", { value: kind, selected: kind === view.kind }, `${kind} (${count})`))]
  const choose = element("select", { id: "class", "aria-label": "Class of failures", on: { change: (event) => { view.kind = event.target.value; view.failed = 20; list() } } }, options)
  const filter = box("failures-filter", "Failures that contain", view.failures, (text) => { view.failures = text; view.failed = 20; list() })
  const told = element("p", { cls: "soft", role: "status", id: "failures-shown" })
  const place = element("div", {})
  function list() {
    const wanted = view.failures.toLowerCase()
    const found = shown.failures.filter((each) => (!view.kind || each.kind === view.kind) && (!wanted || JSON.stringify([each.where, each.message, each.texts]).toLowerCase().includes(wanted)))
    const help = shown.classes.filter(([kind]) => !view.kind || kind === view.kind).map(([, count, text]) => `${count} ${text}`)
    const left = all - shown.failures.length
    const others = left <= 0 ? "" : shown.state === "finished" ? `; ${left} more are in the failures file` : `, the first of each class`
    told.textContent = `${found.length} of ${shown.failures.length} failures${others}. ${help.join("; ")}.`
    const more = found.length > view.failed ? [element("button", { type: "button", on: { click: () => { view.failed += 100; list() } } }, `show ${found.length - view.failed} more`)] : []
    place.replaceChildren(...found.slice(0, view.failed).map(failure), ...more)
  }
  list()
  return [element("h2", {}, "What failed"), element("div", { cls: "tools" }, choose, filter), told, place]
}

function failure(each) {
  const texts = each.texts.map(([name, text]) => element("details", { cls: "held" }, element("summary", {}, name), element("pre", { tabindex: "0" }, text)))
  const copy = each.input ? element("button", { type: "button", title: "An input file of this record alone", on: { click: (event) => copied(event.target, `${each.input}\n`) } }, "copy record") : null
  return element("section", { cls: "card failure", tabindex: "-1" }, element("div", { cls: "head" }, element("h3", {}, each.where), element("span", { cls: "kind" }, each.kind), copy), element("p", {}, each.message), texts)
}

async function copied(button, text) {
  try {
    await navigator.clipboard.writeText(text)
  } catch { // pages of files have no clipboard in some browsers
    const area = element("textarea", {})
    area.value = text
    document.body.append(area)
    area.select()
    document.execCommand("copy")
    area.remove()
  }
  const before = button.textContent
  button.textContent = "copied"
  setTimeout(() => { button.textContent = before }, 1500)
}

const ORDERS = { place: ["as in the input", null], grown: ["longer first", (a, b) => b.change - a.change], shrunk: ["shorter first", (a, b) => a.change - b.change] }

function samples() {
  if (!shown.samples.length) return []
  const filter = box("filter", "Records that contain", view.samples, (text) => { view.samples = text; view.count = 30; list() })
  const options = Object.entries(ORDERS).map(([name, [told]]) => element("option", { value: name, selected: name === view.sort }, told))
  const order = element("select", { id: "sort", "aria-label": "Order of records", on: { change: (event) => { view.sort = event.target.value; list() } } }, options)
  const beside = element("button", { type: "button", id: "beside", "aria-pressed": String(view.beside), title: "s", on: { click: () => { view.beside = !view.beside; beside.setAttribute("aria-pressed", String(view.beside)); list() } } }, "side by side")
  const told = element("p", { cls: "soft", id: "shown", role: "status" })
  const place = element("div", {})
  function list() {
    const wanted = view.samples.toLowerCase()
    const found = shown.samples.filter((sample) => !wanted || text(sample).includes(wanted))
    const by = ORDERS[view.sort][1]
    if (by) found.sort(by)
    told.textContent = `${found.length} of ${shown.samples.length} samples`
    const more = found.length > view.count ? element("button", { type: "button", id: "more", on: { click: () => { view.count += 100; list() } } }, `show ${found.length - view.count} more`) : null
    place.replaceChildren(...found.slice(0, view.count).map(sample), ...(more ? [more] : []))
  }
  list()
  return [element("h2", {}, live && shown.state === "running" ? "The latest answers" : shown.in_place ? "Before and after" : "Texts and answers"), element("div", { cls: "tools" }, filter, order, beside), told, place]
}

function text(sample) {
  sample.text ??= `${sample.where}\n${sample.lines.map(([, pieces]) => pieces.flat().join("")).join("\n")}`.toLowerCase()
  return sample.text
}

function sample(each) {
  const unfolded = view.open.has(each.where)
  const parts = folded(each.lines, unfolded)
  const body = element("div", { cls: "diff" })
  for (const part of parts) {
    if (typeof part === "number") body.append(element("button", { type: "button", cls: "fold", on: { click: (event) => { view.open.add(each.where); event.target.closest(".sample").replaceWith(sample(each)) } } }, `${part} unchanged lines`))
    else if (view.beside) body.append(...columns(part))
    else body.append(...part.map(([kind, pieces]) => line(kind, pieces)))
  }
  return element("section", { cls: "card sample", tabindex: "-1" }, element("div", { cls: "head" }, element("h3", {}, each.where), element("span", { cls: "soft" }, each.size)), body)
}

// Runs of lines, and in between how many unchanged ones are left out.
function folded(lines, unfolded) {
  if (unfolded) return [lines]
  const near = lines.map((_, n) => lines.slice(Math.max(0, n - SAME_SHOWN), n + SAME_SHOWN + 1).some(([kind]) => kind !== "s"))
  const parts = []
  for (let n = 0; n < lines.length;) {
    let end = n
    while (end < lines.length && near[end] === near[n]) end++
    if (near[n] || end - n <= 2) parts.push(lines.slice(n, end))
    else parts.push(end - n)
    n = end
  }
  return parts
}

const MARKS = { s: "  ", g: "- ", n: "+ " }

function line(kind, pieces) {
  const names = { s: "same", g: "gone", n: "new" }
  const inside = pieces.map((piece) => Array.isArray(piece) ? element("mark", {}, piece[0]) : piece)
  return element("div", { cls: `${kind} ${names[kind]}` }, MARKS[kind], inside)
}

// Lines that are gone on the left, beside the new ones in their place on the right.
function columns(lines) {
  const rows = []
  for (let n = 0; n < lines.length;) {
    if (lines[n][0] === "s") {
      rows.push([lines[n], lines[n]])
      n++
      continue
    }
    const gone = [], fresh = []
    while (n < lines.length && lines[n][0] === "g") gone.push(lines[n++])
    while (n < lines.length && lines[n][0] === "n") fresh.push(lines[n++])
    for (let at = 0; at < Math.max(gone.length, fresh.length); at++) rows.push([gone[at], fresh[at]])
  }
  return rows.map(([left, right]) => element("div", { cls: "beside" }, [left, right].map((each, side) => each ? (side && each[0] === "s" ? second(each) : line(...each)) : element("div", { cls: "none" }))))
}

function second(each) {
  const made = line(...each)
  made.classList.add("none") // on a phone, what did not change is shown once
  return made
}

function settings() {
  if (!shown.settings.length) return []
  return [element("h2", {}, "Settings"), element("details", { cls: "card" }, element("summary", {}, `${shown.settings.length} settings`), table([], shown.settings))]
}

function keys() {
  const told = [["/", "filter"], ["j", "next record"], ["k", "the one before"], ["s", "side by side"], ["d", "dark or light"]]
  return element("p", { cls: "soft keys" }, told.flatMap(([key, what]) => [element("kbd", {}, key), ` ${what}   `]))
}

function box(id, told, value, act) {
  return element("input", { type: "search", id, placeholder: told, "aria-label": told, autocomplete: "off", value, on: { input: (event) => act(event.target.value) } })
}

function draw() {
  document.title = `${shown.name} - fabe-ds`
  const active = document.activeElement, id = active?.id
  const at = active instanceof HTMLInputElement ? active.selectionStart : null
  const notes = shown.notes.map((note) => element("p", { cls: "note" }, note))
  page.replaceChildren(...[head(), progress(), tiles(), ...notes, ...charts(), ...failures(), ...samples(), ...settings(), keys()].filter(Boolean))
  const again = id && document.getElementById(id)
  if (again) {
    again.focus({ preventScroll: true })
    if (at !== null) again.setSelectionRange(at, at)
  }
}

// Colours and keys.

function setColours(name) {
  document.documentElement.dataset.colours = name
  document.getElementById("colours")?.setAttribute("aria-pressed", String(name === "dark"))
}

function switchColours() {
  const name = document.documentElement.dataset.colours === "dark" ? "light" : "dark"
  setColours(name)
  try { localStorage.setItem("fabe-ds-colours", name) } catch { /* pages of files may keep nothing */ }
}

const system = matchMedia("(prefers-color-scheme: dark)")
let chosen = null
try { chosen = localStorage.getItem("fabe-ds-colours") } catch { /* as above */ }
setColours(chosen ?? (system.matches ? "dark" : "light"))
system.addEventListener("change", () => { if (!chosen) setColours(system.matches ? "dark" : "light") })

document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)
  if (typing) {
    if (event.key === "Escape") event.target.blur()
    return
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return
  if (event.key === "/") {
    const target = document.getElementById("filter") ?? document.getElementById("failures-filter")
    if (target) { event.preventDefault(); target.focus() }
  } else if (event.key === "j" || event.key === "k") {
    const cards = [...document.querySelectorAll(".card.failure, .card.sample")]
    const at = cards.indexOf(document.activeElement?.closest?.(".card"))
    const next = cards[event.key === "j" ? at + 1 : Math.max(0, at - 1)]
    next?.focus()
    next?.scrollIntoView({ block: "nearest" })
  } else if (event.key === "s") document.getElementById("beside")?.click()
  else if (event.key === "d") switchColours()
})

// A run that goes on.

async function follow() {
  let last = ""
  for (;;) {
    try {
      const answer = await (await fetch("data.json", { cache: "no-store" })).text()
      if (answer !== last) {
        shown = JSON.parse(answer)
        draw()
        last = answer
      }
    } catch {
      if (!shown || shown.state === "finished" || shown.state === "stopped") return
      if (shown.state !== "gone") {
        shown.state = "gone"
        shown.progress.line = "what followed the run has ended; `fabe-ds report` makes the page of it"
        draw()
      }
    }
    await new Promise((done) => setTimeout(done, 1000))
  }
}

if (live) follow()
else draw()
