"use strict";
// Draws the studies of the page: laws with their runs, learning curves, and a table of runs that is linked to them.
(function () {
  const { studies, colours, markers } = JSON.parse(document.getElementById("studies").textContent);
  const byId = (id) => document.getElementById(id);
  const many = studies.length > 1;
  const config = { responsive: true, displaylogo: false };
  const name = (study, architecture) => (many ? study.name + ": " : "") + architecture;
  // Four significant digits, with an SI suffix for what is large.
  const short = (v) => {
    if (v === null || v === undefined) return "";
    if (typeof v !== "number") return String(v);
    const size = Math.abs(v);
    for (const [scale, suffix] of [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (size >= scale) return +(v / scale).toPrecision(4) + suffix;
    return String(+v.toPrecision(4));
  };

  const series = [];
  studies.forEach((study) => {
    for (const architecture of new Set(study.runs.map((run) => run.architecture)))
      series.push({ study, architecture, name: name(study, architecture) });
  });
  series.forEach((one, k) => {
    one.colour = colours[k % colours.length];
    one.marker = markers[k % markers.length];
  });

  const axes = [...new Set(studies.flatMap((study) => Object.keys(study.axes)))];
  for (const axis of axes) {
    const words = studies.find((study) => study.axes[axis]).axes[axis].words;
    byId("axis").add(new Option(words, axis));
  }
  if (!studies.some((study) => Object.values(study.axes).some((axis) => axis.floor !== null)))
    byId("measure").querySelector("[value=known]").disabled = true;

  function floorOf(one, axis) {
    const measure = byId("measure").value, found = one.study.axes[axis];
    if (measure === "loss") return 0;
    return measure === "known" ? found.floor : found.laws[one.architecture]?.floor ?? null;
  }

  function over(values, floor) {
    return values.map((v) => (v === null || (floor && v - floor <= 0) ? null : v - floor));
  }

  function hover(run) {
    return [run.id, short(run.shape), short(run.rate), short(run.seed), short(run.loss), run.redo, run.status];
  }

  const TEMPLATE = "<b>run %{customdata[0]}</b> (%{customdata[6]})<br>shape %{customdata[1]}, rate %{customdata[2]}, " +
    "seed %{customdata[3]}<br>loss %{customdata[4]}<br>%{customdata[5]}<extra></extra>";
  const folded = (text) => text.replace(/(.{1,60})(\s|$)/g, "$1<br>");

  function tracesOf(one, axis) {
    const found = one.study.axes[axis];
    const floor = found ? floorOf(one, axis) : null;
    if (!found || floor === null) return [];
    const group = { legendgroup: one.name, name: one.name };
    const traces = [];
    const curve = found.laws[one.architecture]?.curve;
    if (curve) {
      if (curve.low) {
        traces.push({ ...group, x: [...curve.x, ...[...curve.x].reverse()],
          y: [...over(curve.high, floor), ...over(curve.low, floor).reverse()], fill: "toself", fillcolor: one.colour,
          opacity: 0.15, line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false });
      }
      for (const [keep, dash] of [[(x) => x <= curve.fitted_to * 1.0001, "solid"], [(x) => x >= curve.fitted_to, "dash"]])
        traces.push({ ...group, x: curve.x, y: over(curve.y, floor).map((y, k) => (keep(curve.x[k]) ? y : null)),
          mode: "lines", line: { color: one.colour, dash, width: 2 }, hoverinfo: "skip", showlegend: false });
    }
    // Fitted ones first: the key shows the look of the first.
    const role = (run) => ["fitted", "held out"].indexOf(run.roles[axis]);
    const runs = one.study.runs.filter((run) => run.architecture === one.architecture && run.x[axis] > 0 && run.loss !== null &&
      (byId("beside").checked || role(run) >= 0)).sort((a, b) => (role(b) === 0) - (role(a) === 0));
    traces.push({ ...group, x: runs.map((run) => run.x[axis]), y: over(runs.map((run) => run.loss), floor), mode: "markers",
      marker: { color: one.colour, symbol: runs.map((run) => one.marker + (run.roles[axis] === "fitted" ? "" : "-open")), size: 8,
        line: { width: 1, color: one.colour } },
      customdata: runs.map((run) => [...hover(run).slice(0, 5), folded(run.redo), run.roles[axis] || run.status]),
      hovertemplate: TEMPLATE });
    return traces;
  }

  function draw() {
    const axis = byId("axis").value, excess = byId("measure").value !== "loss";
    const scale = (id) => (byId(id).checked ? "log" : "linear");
    const target = studies[0].target + { loss: "", known: " minus the known floor", fitted: " minus the fitted floor" }[byId("measure").value];
    const number = { tickformat: ".4~s", nticks: 6, automargin: true };
    byId("beside-part").hidden = !series.some((one) => one.study.runs.some((run) => !["fitted", "held out"].includes(run.roles[axis])));
    Plotly.react("laws", series.flatMap((one) => tracesOf(one, axis)), {
      margin: { t: 10, r: 10, l: 10, b: 10 }, hovermode: "closest", legend: { orientation: "h", y: -0.25 },
      xaxis: { ...number, type: scale("logx"), title: { text: byId("axis").selectedOptions[0].text } },
      yaxis: { ...number, tickformat: ".4~g", type: excess ? "log" : scale("logy"), title: { text: target } },
    }, config);
    byId("texts").replaceChildren(...series.filter((one) => one.study.axes[axis]?.laws[one.architecture]).map((one) => {
      const line = document.createElement("li");
      line.textContent = one.name + ": " + one.study.axes[axis].laws[one.architecture].text;
      return line;
    }));
    table();
  }

  function learning(only) {
    const traces = [];
    for (const one of series) {
      const ids = new Set(one.study.runs.filter((run) => run.architecture === one.architecture).map((run) => run.id));
      const own = one.study.learning.filter((line) => ids.has(line.id) && line.x.length && (!only || only.has(line.id)));
      own.forEach((line, k) => traces.push({ x: line.x, y: line.y, mode: "lines", name: one.name, legendgroup: one.name,
        showlegend: k === 0, line: { color: one.colour, width: 1 }, opacity: 0.6, text: line.id,
        hovertemplate: "run " + line.id + "<br>%{x:.4~s} examples: %{y:.4~r}<extra></extra>" }));
    }
    byId("learning-part").hidden = !studies.some((study) => study.learning.some((line) => line.x.length));
    if (byId("learning-part").hidden) return;
    Plotly.react("learning", traces, { margin: { t: 10, r: 10, l: 10, b: 10 }, legend: { orientation: "h", y: -0.25 },
      xaxis: { type: "log", tickformat: ".4~s", nticks: 6, automargin: true, title: { text: "training examples" } },
      yaxis: { automargin: true, title: { text: "progressive logloss" } } }, config);
  }

  // Table ------------------------------------------------------------------------------------------------------------
  const all = series.flatMap((one) => one.study.runs.filter((run) => run.architecture === one.architecture)
    .map((run) => ({ ...run, label: one.name })));
  let order = { key: "loss", down: false };
  const value = {
    run: (run) => run.id, architecture: (run) => run.label, role: (run) => run.roles[byId("axis").value] || run.status,
    size: (run) => run.x[byId("axis").value], rate: (run) => run.rate, seed: (run) => run.seed, loss: (run) => run.loss,
    seconds: (run) => run.seconds,
  };

  function shown() {
    const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = all.filter((run) => {
      const text = Object.values(value).map((of) => short(of(run))).join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const of = value[order.key];
    return kept.sort((a, b) => {
      const [x, y] = [of(a), of(b)];
      if (x === null || x === undefined) return 1;
      if (y === null || y === undefined) return -1;
      return (x > y ? 1 : x < y ? -1 : 0) * (order.down ? -1 : 1);
    });
  }

  function table() {
    const runs = shown();
    byId("count").textContent = runs.length + " of " + all.length + " runs";
    byId("rows").replaceChildren(...runs.map((run) => {
      const row = document.createElement("tr");
      row.dataset.run = run.id;
      row.title = run.redo;
      row.append(...Object.entries(value).map(([key, of]) => {
        const cell = document.createElement("td");
        cell.textContent = short(of(run));
        if (!["run", "architecture", "role"].includes(key)) cell.className = "num";
        return cell;
      }));
      row.addEventListener("click", () => point(run.id));
      return row;
    }));
    learning(runs.length < all.length ? new Set(runs.map((run) => run.id)) : null);
  }

  // Shows a run of the table in the plot above.
  function point(id) {
    const drawn = () => byId("laws").data.some((trace) => (trace.customdata || []).some((run) => run[0] === id));
    if (!drawn()) {
      byId("beside").checked = true;
      draw();
    }
    byId("laws").data.forEach((trace, curveNumber) => {
      const pointNumber = (trace.customdata || []).findIndex((run) => run[0] === id);
      if (pointNumber >= 0) {
        byId("laws").scrollIntoView({ block: "center" });
        Plotly.Fx.hover("laws", [{ curveNumber, pointNumber }]);
      }
    });
  }

  document.querySelectorAll("#runs th").forEach((head) => head.addEventListener("click", () => {
    order = { key: head.dataset.key, down: order.key === head.dataset.key && !order.down };
    table();
  }));
  for (const id of ["axis", "measure", "logx", "logy", "beside"]) byId(id).addEventListener("change", draw);
  byId("filter").addEventListener("input", table);
  draw();
  byId("laws").on("plotly_click", (event) => {
    const run = event.points[0].customdata;
    if (run) {
      byId("filter").value = run[0];
      table();
    }
  });
})();
