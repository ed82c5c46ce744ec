"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  function bytesOf(base64) {
    const letters = atob(base64);
    const bytes = new Uint8Array(letters.length);
    for (let at = 0; at < letters.length; at++) bytes[at] = letters.charCodeAt(at);
    return bytes;
  }

  // ---------------------------------------------------------------------------------------------------------- theme
  const themes = {
    light: { ink: "#1c1f24", soft: "#5b626d", halo: "rgba(255,255,255,0.8)" },
    dark: { ink: "#e8eaee", soft: "#a3abb7", halo: "rgba(21,23,27,0.75)" },
  };
  const config = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtons: [["toImage"]] };
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("moe-study-theme"); } catch { /* no storage for files in some browsers */ }
  const theme = () => (chosen in themes ? chosen : system.matches ? "dark" : "light");
  function applyTheme() {
    root.dataset.theme = theme();
    byId("theme").textContent = theme() === "dark" ? "light" : "dark";
    for (const place of document.querySelectorAll(".figure[data-drawn]")) draw(place);
  }
  byId("theme").addEventListener("click", () => {
    chosen = theme() === "dark" ? "light" : "dark";
    try { localStorage.setItem("moe-study-theme", chosen); } catch { /* it lasts until the page is closed */ }
    applyTheme();
  });
  system.addEventListener("change", applyTheme);

  // -------------------------------------------------------------------------------------------------------- figures
  async function unpackPlotly() {
    const stream = new Blob([bytesOf(byId("plotly").textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    performance.mark("unpacked");
    document.head.append(script);
    performance.mark("plotly");
  }

  function dressed(name) {
    const colours = themes[theme()];
    const swaps = { [data.ink]: colours.ink, [data.halo]: colours.halo, ...(theme() === "dark" ? data.brighter : {}) };
    let text = JSON.stringify(data.figures[name]);
    for (const [from, to] of Object.entries(swaps)) text = text.replaceAll(from, to);
    const figure = JSON.parse(text);
    const axis = figure.layout.coloraxis;
    if (axis && JSON.stringify(axis.colorscale) === JSON.stringify(data.diverging[0]) && theme() === "dark")
      axis.colorscale = data.diverging[1];
    return figure;
  }

  function draw(place) {
    const name = place.dataset.figure;
    const figure = dressed(name);
    if (name === "load") {
      let layer = 0;
      for (const trace of figure.data) if (trace.type === "bar") trace.y = data.loads.values[step()][layer++];
    }
    place.style.height = figure.layout.height + "px";
    place.dataset.drawn = name;
    figure.layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: themes[theme()].soft, activecolor: themes[theme()].ink };
    return Plotly.react(place, figure.data, figure.layout, config);
  }

  // ------------------------------------------------------------------------------------------------------ controls
  const slider = byId("step");
  const step = () => (slider ? Number(slider.value) : 0);
  slider?.addEventListener("input", () => {
    byId("step-shown").textContent = data.loads.steps[step()];
    const place = document.querySelector('[data-figure="load"]');
    if (!place.dataset.drawn) return;
    const bars = place.data.map((trace, index) => [trace, index]).filter(([trace]) => trace.type === "bar");
    Plotly.restyle(place, { y: data.loads.values[step()] }, bars.map(([, index]) => index));
  });
  for (const box of document.querySelectorAll("select[data-chooses]"))
    box.addEventListener("change", () => {
      const place = document.querySelector(`[data-chosen="${box.dataset.chooses}"]`);
      place.dataset.figure = box.value;
      draw(place);
    });
  for (const box of document.querySelectorAll("select[data-shows]"))
    box.addEventListener("change", () => {
      for (const table of document.querySelectorAll(`[data-table="${box.dataset.shows}"]`))
        table.hidden = table.dataset.index !== box.value;
    });

  // ------------------------------------------------------------------------------------------------------- experts
  const lines = ["none", "underline solid 2px", "underline dotted 2px", "underline double 2px"];
  function legible(colour) {
    const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
    return 0.299 * red + 0.587 * green + 0.114 * blue > 115 ? "#000000" : "#ffffff";
  }
  const looks = (expert) => {
    const colour = data.experts[expert % data.experts.length];
    const line = lines[Math.floor(expert / data.experts.length) % lines.length];
    return { background: colour, color: legible(colour), textDecoration: line };
  };
  for (const chip of document.querySelectorAll(".chip[data-expert]"))
    chip.style.background = looks(Number(chip.dataset.expert)).background;

  // --------------------------------------------------------------------------------------------------- text viewer
  const arrays = { Uint8: Uint8Array, Uint16: Uint16Array, Uint32: Uint32Array };
  function unpacked(packed) {
    return new arrays[packed.type](bytesOf(packed.data).buffer);
  }
  const pane = byId("text-pane");
  if (pane) viewer();

  function viewer() {
    const tokens = data.tokens;
    const text = unpacked(tokens.text);
    const loss = unpacked(tokens.loss);
    const starts = new Set(tokens.starts);
    const layers = tokens.layers.map((layer) => ({
      ...layer,
      experts: unpacked(layer.experts),
      weights: unpacked(layer.weights),
      dropped: layer.dropped && unpacked(layer.dropped),
    }));
    const [domainBox, layerBox, rankBox] = ["viewer-domain", "viewer-layer", "viewer-rank"].map(byId);
    const tip = byId("tip");
    let spans = [];
    let first = 0;
    let picked = null;
    let lit = null;

    // What is in a place of a token: null where it is empty.
    function place(token, layer, rank) {
      if (rank >= layer.top_k) return null;
      const at = token * layer.top_k + rank;
      if (layer.experts[at] === layer.empty) return null;
      const weight = (layer.weights[at] - layer.weight_zero) * layer.weight_step;
      return { expert: layer.experts[at], weight, dropped: Boolean(layer.dropped && layer.dropped[at]) };
    }
    const current = () => layers[Number(layerBox.value)];
    const here = (token) => place(token, current(), Number(rankBox.value));
    const visible = (letters) => letters.replaceAll("\n", "↵").replaceAll("\t", "→");
    const lossOf = (token) => (loss[token] * tokens.loss_step).toFixed(2);

    function fill() {
      const domain = Number(domainBox.value);
      first = tokens.domains.slice(0, domain).reduce((sum, each) => sum + each.count, 0);
      const pieces = document.createDocumentFragment();
      spans = [];
      for (let index = 0; index < tokens.domains[domain].count; index++) {
        const token = first + index;
        if (index && starts.has(token)) pieces.append(document.createElement("hr"));
        const span = document.createElement("span");
        const letters = tokens.texts[text[token]];
        // A line break has a sign, which can be pointed at, and still breaks the line.
        span.textContent = letters.includes("\n") ? letters.replaceAll("\n", "↵\n") : letters || "∅";
        span.tabIndex = index ? -1 : 0;
        span.setAttribute("role", "option");
        span.dataset.token = token;
        spans.push(span);
        pieces.append(span);
      }
      pane.replaceChildren(pieces);
      picked = null;
      byId("detail").innerHTML = "<p>Click a token.</p>";
      colour();
    }

    function colour() {
      for (const span of spans) {
        const found = here(Number(span.dataset.token));
        Object.assign(span.style, found ? looks(found.expert) : { background: "", color: "", textDecoration: "" });
        span.dataset.expert = found ? found.expert : "";
        span.classList.toggle("lit", Boolean(found) && found.expert === lit);
      }
      pane.classList.toggle("dimmed", lit !== null);
      outline();
    }

    function outline() {
      const expert = picked === null ? null : here(picked)?.expert ?? null;
      for (const span of spans) {
        const isPicked = Number(span.dataset.token) === picked;
        span.classList.toggle("here", isPicked);
        span.classList.toggle("same", expert !== null && !isPicked && span.dataset.expert === String(expert));
        span.setAttribute("aria-selected", String(isPicked));
      }
    }

    function legend() {
      byId("legend").replaceChildren(
        ...Array.from({ length: current().n_experts }, (_, expert) => {
          const button = document.createElement("button");
          button.type = "button";
          button.textContent = expert;
          button.title = `show only expert ${expert}`;
          button.setAttribute("aria-pressed", String(lit === expert));
          Object.assign(button.style, looks(expert));
          button.addEventListener("click", () => {
            lit = lit === expert ? null : expert;
            for (const other of byId("legend").children)
              other.setAttribute("aria-pressed", String(lit !== null && Number(other.textContent) === lit));
            colour();
          });
          return button;
        }),
      );
    }

    function element(name, content, className) {
      const made = document.createElement(name);
      if (content !== undefined) made.append(content);
      if (className) made.className = className;
      return made;
    }

    function pick(token) {
      picked = token;
      outline();
      const heading = element("h3");
      heading.style.marginTop = 0;
      heading.append("Token ", element("code", visible(tokens.texts[text[token]])));
      const table = element("table");
      const head = table.createTHead().insertRow();
      for (const name of ["layer", "expert", "weight"]) head.append(element("th", name));
      const body = table.createTBody();
      for (const layer of layers)
        for (let rank = 0; rank < layer.top_k; rank++) {
          const found = place(token, layer, rank);
          const row = body.insertRow();
          row.append(element("th", rank ? "" : String(layer.block)));
          const expert = row.insertCell();
          const weight = row.insertCell();
          if (!found) { expert.append("none"); continue; }
          const chip = element("i", undefined, "chip");
          chip.style.background = looks(found.expert).background;
          expert.append(chip, String(found.expert));
          weight.append(found.dropped ? "dropped" : found.weight.toFixed(2));
          const bar = element("span", undefined, "bar");
          bar.style.width = `${Math.min(1, Math.abs(found.weight) / (layer.weight_step * layer.weight_zero)) * 4}em`;
          if (!found.dropped) weight.append(bar);
        }
      const outlined = spans.filter((span) => span.classList.contains("same")).length;
      const expert = here(token)?.expert;
      byId("detail").replaceChildren(
        heading,
        element("p", `Loss of the token after it: ${lossOf(token)} nats.`),
        table,
        element("p", expert === undefined ? "No expert here." : `Outlined: ${outlined} other tokens of expert ${expert}.`),
      );
    }

    function show(span) {
      const token = Number(span.dataset.token);
      const found = here(token);
      const said = found
        ? `expert ${found.expert}, ${found.dropped ? "dropped" : "weight " + found.weight.toFixed(2)}`
        : "no expert";
      tip.replaceChildren(`${visible(tokens.texts[text[token]])}: ${said}, loss ${lossOf(token)}`);
      tip.hidden = false;
      const box = span.getBoundingClientRect();
      tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
      tip.style.top = box.top > 50 ? `${box.top - tip.offsetHeight - 6}px` : `${box.bottom + 6}px`;
    }

    const spanOf = (event) => event.target.closest("span[data-token]");
    pane.addEventListener("mouseover", (event) => spanOf(event) && show(spanOf(event)));
    pane.addEventListener("focusin", (event) => spanOf(event) && show(spanOf(event)));
    for (const leaving of ["mouseleave", "focusout", "scroll"]) pane.addEventListener(leaving, () => { tip.hidden = true; });
    function enter(span) {
      for (const other of pane.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
      span.tabIndex = 0;
      span.focus();
    }
    pane.addEventListener("click", (event) => {
      const span = spanOf(event);
      if (!span) return;
      enter(span);
      pick(Number(span.dataset.token));
    });
    pane.addEventListener("keydown", (event) => {
      const span = spanOf(event);
      if (!span) return;
      const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 12, ArrowUp: -12, Home: -Infinity, End: Infinity };
      if (event.key in moves) {
        const at = Number(span.dataset.token) - first + moves[event.key];
        enter(spans[Math.max(0, Math.min(spans.length - 1, at))]);
      } else if (event.key === "Enter" || event.key === " ") pick(Number(span.dataset.token));
      else return;
      event.preventDefault();
    });

    domainBox.addEventListener("change", fill);
    rankBox.addEventListener("change", () => { colour(); if (picked !== null) pick(picked); });
    layerBox.addEventListener("change", () => {
      if (lit !== null && lit >= current().n_experts) lit = null;
      legend();
      colour();
      if (picked !== null) pick(picked);
    });
    byId("viewer-numbers").addEventListener("change", (event) => pane.classList.toggle("numbers", event.target.checked));
    legend();
    fill();
  }

  // --------------------------------------------------------------------------------------------------------- start
  applyTheme();
  unpackPlotly().then(() => {
    root.dataset.ready = "plotly";
    // What is in sight is drawn at once, the rest when it comes near.
    const watcher = new IntersectionObserver(
      (entries) => {
        for (const entry of entries)
          if (entry.isIntersecting) { watcher.unobserve(entry.target); draw(entry.target); }
        performance.mark("drawn");
      },
      { rootMargin: "600px" },
    );
    for (const place of document.querySelectorAll(".figure")) watcher.observe(place);
  });
})();
