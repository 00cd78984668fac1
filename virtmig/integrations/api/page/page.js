"use strict";
(function () {
  const TURN_MS = 2000, PAGE = 25, MOST_POINTS = 2000, MOST_LINES = 200;
  // HTTP/1.1 gives a browser six connections; the others are shown by the list's numbers
  const MOST_STREAMS = 3;
  const MIB = 1048576;
  const cards = new Map();
  const by = id => document.getElementById(id);
  let pastPages = 1;

  const size = n => {
    if (n == null) return "–";
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let at = 0;
    while (n >= 1024 && at < units.length - 1) { n /= 1024; at++; }
    return n.toFixed(at && n < 100 ? 1 : 0) + " " + units[at];
  };
  const rate = n => n == null ? "–" : size(n) + "/s";
  const seconds = s => {
    if (s == null) return "–";
    if (s < 60) return s.toFixed(s < 10 ? 1 : 0) + " s";
    return Math.floor(s / 60) + " min " + Math.round(s % 60) + " s";
  };
  const make = (name, text, kind) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (kind) element.className = kind;
    return element;
  };

  async function call(path, method) {
    const reply = await fetch(path, { method: method || "GET", headers: { accept: "application/json" },
      signal: AbortSignal.timeout(method ? 60000 : 10000) });
    const body = await reply.json();
    if (!reply.ok) throw new Error(body.detail + (body.hint ? "\nWhat helps: " + body.hint : ""));
    return body;
  }

  function say(text) {
    by("said").textContent = text;
    by("said").hidden = !text;
  }

  function ask(title, text, yes) {
    const dialog = by("ask");
    by("ask-title").textContent = title;
    by("ask-text").textContent = text;
    by("ask-yes").textContent = yes;
    dialog.showModal();
    // not `close`: that event comes later, maybe when the next question stands here
    return new Promise(done => {
      dialog.oncancel = () => done(false);
      dialog.querySelector("form").onsubmit = event => done(event.submitter != null && event.submitter.value === "yes");
    });
  }

  // -- one running migration ------------------------------------------------------------------------------------

  class Chart {
    constructor(holder, title, names) {
      this.names = names;
      this.figure = make("figure");
      this.figure.append(make("figcaption", title));
      holder.append(this.figure);
      this.data = [[], ...names.map(() => [])];
      this.draw();
      new ResizeObserver(() => this.plot.setSize(this.dimensions())).observe(this.figure);
    }
    dimensions() { return { width: Math.max(200, this.figure.clientWidth), height: 190 }; }
    draw() {
      const css = getComputedStyle(document.documentElement);
      const color = name => css.getPropertyValue(name).trim();
      const line = { stroke: color("--line"), width: 1 };
      const axis = { stroke: color("--soft"), grid: line, ticks: line, size: 30 };
      if (this.plot) this.plot.destroy();
      this.plot = new uPlot({
        ...this.dimensions(), scales: { x: { time: false } }, legend: { live: false },
        axes: [{ ...axis, values: (_, all) => all.map(v => v + " s") }, { ...axis, size: 60 }],
        series: [{ label: "second" }, ...this.names.map((label, n) =>
          ({ label, stroke: color("--s" + n), width: 1.6, points: { show: false } }))],
      }, this.data, this.figure);
    }
    add(second, values) {
      this.data[0].push(second);
      values.forEach((value, n) => this.data[n + 1].push(value == null ? null : value / MIB));
      if (this.data[0].length > MOST_POINTS) this.data = this.data.map(row => row.filter((_, n) => n % 2 === 0));
      this.stale = true;
    }
    refresh() {
      if (!this.stale) return;
      this.stale = false;
      this.plot.setData(this.data);
    }
  }

  class Card {
    constructor(migration) {
      this.id = migration.id;
      this.element = by("card").content.firstElementChild.cloneNode(true);
      this.element.dataset.id = migration.id;
      const title = migration.domain + ": " + (migration.source_node || "here") + " to " +
        (migration.dest_node || migration.dest_uri);
      this.find("h3").textContent = title;
      this.find("progress").setAttribute("aria-label", "progress of " + migration.domain);
      this.find(".abort").setAttribute("aria-label", "Abort the migration of " + migration.domain);
      this.find(".postcopy").setAttribute("aria-label", "Switch " + migration.domain + " to postcopy");
      this.find(".abort").addEventListener("click", () => this.abort());
      this.find(".postcopy").addEventListener("click", () => this.postcopy());
      by("now").append(this.element);
      this.update(migration);
    }
    find(selector) { return this.element.querySelector(selector); }
    update(migration) {
      const before = this.migration, at = document.activeElement;
      this.migration = migration;
      if (migration.dest_node) {
        this.find("h3").textContent = migration.domain + ": " + migration.source_node + " to " + migration.dest_node;
      }
      this.numbers(migration);
      const inPostcopy = (migration.phase || "").startsWith("postcopy");
      this.find(".postcopy").hidden = !migration.postcopy_allowed || inPostcopy;
      this.find(".postcopy").disabled = migration.phase !== "precopy";
      this.find(".abort").hidden = inPostcopy;
      this.keepPlace(at);
      if (before && before.phase !== migration.phase) by("told").textContent = migration.domain + ": " + migration.phase;
    }
    keepPlace(before) {
      // a button that is hidden or disabled, maybe behind a dialog, loses the keyboard's place; `before`: where it was
      const lost = this.element.contains(before) && (before.hidden || before.disabled);
      if (lost && [document.body, before].includes(document.activeElement)) this.find("h3").focus({ preventScroll: true });
    }
    numbers(now) {
      const migration = this.migration;
      const words = [now.phase || migration.status];
      if (now.phase === "precopy" && now.full_passes != null) words[0] += ", pass " + (now.full_passes + 1);
      const percent = now.percent != null ? now.percent : migration.percent;
      words.push(percent.toFixed(1) + " %");
      if (now.converging === false) words.push("not converging");
      else if (now.eta_low_s != null) {
        words.push("ends in " + seconds(now.eta_low_s) + (now.eta_high_s != null ? " to " + seconds(now.eta_high_s) : " or more"));
      }
      this.find(".state").textContent = words.join(" · ");
      this.find("progress").value = percent;
      const rows = [["since", seconds(now.elapsed_s)], ["remaining", size(now.memory_remaining_bytes)],
        ["of memory", size(now.memory_total_bytes)], ["sent at", rate(now.memory_bytes_per_s)],
        ["guest writes", rate(now.dirty_bytes_per_s)],
        ["downtime limit", now.downtime_limit_ms != null ? now.downtime_limit_ms + " ms" : "–"]];
      if (now.disk_total_bytes) rows.push(["disks remaining", size(now.disk_remaining_bytes)]);
      if (now.throttle_percent) rows.push(["taken from the guest", now.throttle_percent + " % CPU"]);
      const list = this.find("dl");
      list.replaceChildren(...rows.map(([name, text]) => {
        const pair = make("div");
        pair.append(make("dt", name), make("dd", text));
        return pair;
      }));
    }
    follow() {
      if (this.stream) return;
      const stream = this.stream = new EventSource("/v1/migrations/" + this.id + "/events");
      const on = (name, act) => stream.addEventListener(name, event => { live(true); act(JSON.parse(event.data)); });
      on("migration", migration => this.update(migration));
      on("sample", sample => this.sample(sample));
      on("decision", row => this.line(row.at_s, row.action + ": " + row.reason));
      on("message", row => this.line(row.at_s, (row.level === "info" ? "" : row.level + ": ") + row.text));
      on("dropped", row => this.line(null, row.samples + " samples were left out"));
      on("end", migration => {
        stream.close();
        by("told").textContent = migration.sentence || migration.domain + ": " + migration.status;
        look();
      });
      stream.onerror = () => live(false);
    }
    sample(sample) {
      if (!this.charts) {
        const holder = this.find(".charts");
        this.charts = [new Chart(holder, "Remaining memory (MiB)", ["remaining"]),
          new Chart(holder, "Rates (MiB/s)", ["sent", "guest writes"])];
      }
      this.charts[0].add(sample.at_s, [sample.memory_remaining_bytes]);
      this.charts[1].add(sample.at_s, [sample.memory_bytes_per_s, sample.dirty_bytes_per_s]);
      this.last = sample;
      if (this.waiting) return;
      this.waiting = true;
      requestAnimationFrame(() => {
        this.waiting = false;
        const total = this.last.total_bytes, left = this.last.remaining_bytes;
        const now = total && left != null ? Math.min(99, 100 - 100 * left / total) : 0;
        const reached = this.last.converging === false ? 0 : this.percent || this.migration.percent;
        this.percent = Math.max(reached, now);
        this.numbers({ ...this.last, percent: this.percent });
        this.charts.forEach(chart => chart.refresh());
      });
    }
    line(second, text) {
      const list = this.find(".log");
      this.find("details").hidden = false;
      list.append(make("li", (second == null ? "" : second.toFixed(2) + " s  ") + text));
      while (list.children.length > MOST_LINES) list.firstElementChild.remove();
    }
    async abort() {
      const { domain, source_node } = this.migration;
      await this.act("abort", "Abort the migration of " + domain + "?",
        "What has moved is thrown away. " + domain + " stays on " + (source_node || "its source") + ".", "Abort it");
    }
    async postcopy() {
      const { domain, dest_node, source_node } = this.migration;
      await this.act("postcopy", "Switch " + domain + " to postcopy?",
        domain + " will run on " + dest_node + " at once and fetch the rest of its memory from " + source_node +
        ". From then on it cannot be aborted, and it needs both hosts until it has finished.", "Switch it");
    }
    async act(name, title, text, yes) {
      if (this.acting) return;
      const at = document.activeElement;
      if (!await ask(title, text, yes)) {
        setTimeout(() => this.keepPlace(at));
        return;
      }
      this.acting = true; // a disabled button would lose the keyboard's place
      try {
        const done = await call("/v1/migrations/" + this.id + "/" + name, "POST");
        say("");
        by("told").textContent = done.message;
        this.update(done.migration);
      } catch (error) {
        say(error.message);
      } finally {
        this.acting = false;
        this.keepPlace(at);
      }
      look();
    }
    remove() {
      if (this.stream) this.stream.close();
      const focused = this.element.contains(document.activeElement);
      this.element.remove();
      if (focused) by("past-title").focus();
    }
  }

  // -- the list ---------------------------------------------------------------------------------------------------

  function past(migration) {
    const row = make("li");
    row.dataset.id = migration.id;
    const head = make("p");
    head.append(make("span", migration.ending === "refused" ? "refused" : migration.status, "word " + migration.status),
      " " + (migration.sentence || migration.domain));
    const words = [new Date(migration.created_at).toLocaleString()];
    if (migration.elapsed_s != null) words.push("took " + seconds(migration.elapsed_s));
    if (migration.downtime_ms != null) words.push("downtime " + migration.downtime_ms + " ms");
    row.append(head, make("p", words.join(" · "), "soft"));
    if (migration.error && migration.status !== "cancelled") row.append(make("p", migration.error));
    for (const reason of migration.reasons) {
      row.append(make("p", reason.reason + (reason.way_out ? " – a way out: " + reason.way_out : "")));
    }
    if (migration.record_id) {
      const links = make("nav");
      links.setAttribute("aria-label", migration.domain + ", " + words[0]);
      for (const [name, text] of [["report", "Report"], ["explain", "Explained"], ["log", "Log"]]) {
        const link = make("a", text);
        link.href = "/v1/migrations/" + migration.id + "/" + name;
        links.append(link);
      }
      row.append(links);
    }
    return row;
  }

  function live(ok) {
    by("link").textContent = ok ? "live" : "connection lost; trying again. Migrations go on without this page";
    by("link").classList.toggle("lost", !ok);
  }

  let looking = null;
  function look() {
    looking = looking || update().catch(() => live(false)).finally(() => { looking = null; });
    return looking;
  }

  let shownPast = "";
  async function update() {
    const found = [];
    let marker = "";
    for (let page = 0; page < pastPages; page++) {
      const part = await call("/v1/migrations?limit=" + PAGE + (marker && "&marker=" + marker));
      found.push(...part.migrations);
      marker = part.next_marker;
      if (!marker) break;
    }
    live(true);
    by("more").hidden = !marker;
    const now = found.filter(migration => migration.running || migration.status === "queued");
    for (const [id, card] of cards) {
      if (!now.some(migration => migration.id === id)) {
        card.remove();
        cards.delete(id);
      }
    }
    for (const migration of now) {
      const card = cards.get(migration.id);
      if (card) card.update(migration);
      else cards.set(migration.id, new Card(migration));
    }
    [...cards.values()].slice(0, MOST_STREAMS).forEach(card => card.follow());
    by("none").hidden = now.length > 0;
    document.title = now.length ? now.length + " running – virtmig" : "virtmig";
    const ended = found.filter(migration => !now.includes(migration));
    const key = JSON.stringify(ended.map(migration => [migration.id, migration.status, migration.updated_at]));
    if (key !== shownPast && !by("past").contains(document.activeElement)) {
      shownPast = key;
      by("past").replaceChildren(...ended.map(past));
    }
    by("no-past").hidden = ended.length > 0;
  }

  by("more").addEventListener("click", () => { pastPages++; look(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const card of cards.values()) (card.charts || []).forEach(chart => chart.draw());
  });
  look();
  setInterval(() => { if (!document.hidden) look(); }, TURN_MS);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
})();
