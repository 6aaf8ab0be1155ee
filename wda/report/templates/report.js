// The scatter: what of it is shown is chosen above it, by its legend, and by the page's colours.
"use strict";
(() => {
  const figure = JSON.parse(document.getElementById("scatter-data").textContent);
  const plot = document.getElementById("scatter");
  const controls = Object.fromEntries(
    [...document.querySelectorAll("[data-choice]")].map((one) => [one.dataset.choice, one]),
  );

  // Visibility of every trace, and which of them stand for their run in the legend. A run that the
  // reader has put out of sight stays so when another matrix is chosen.
  function choose(traces) {
    const matrix = controls.matrix.value;
    const vectors = controls.vectors.value;
    const random = controls.random?.checked;
    const away = new Set(
      traces.filter((one) => one.visible === "legendonly").map((one) => one.meta.run),
    );
    const named = new Set();
    const shown = traces.map(({ meta }) => {
      if (meta.vectors !== vectors || (meta.kind === "random" && !random)) return false;
      // Of all matrices together there is one line, which no single matrix has.
      if (matrix === "") return meta.kind !== "line" || meta.matrix === "all";
      return meta.matrix === matrix;
    });
    return {
      visible: traces.map(({ meta }, i) => shown[i] && (away.has(meta.run) ? "legendonly" : true)),
      showlegend: traces.map(({ meta }, i) => {
        if (!shown[i] || meta.kind !== "points" || named.has(meta.run)) return false;
        named.add(meta.run);
        return true;
      }),
    };
  }

  function colours() {
    const of = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const [ink, paper, line] = ["--ink", "--paper", "--line"].map(of);
    const axis = { color: ink, gridcolor: line, linecolor: ink, tickcolor: ink };
    const layout = {
      paper_bgcolor: paper,
      plot_bgcolor: paper,
      "font.color": ink,
      "hoverlabel.bgcolor": paper,
      "hoverlabel.font.color": ink,
    };
    for (const which of ["xaxis", "yaxis"])
      for (const [name, colour] of Object.entries(axis)) layout[`${which}.${name}`] = colour;
    return layout;
  }

  const first = choose(figure.data);
  figure.data.forEach((trace, i) => {
    trace.visible = first.visible[i];
    trace.showlegend = first.showlegend[i];
  });
  figure.layout.font = { family: getComputedStyle(document.body).fontFamily, size: 13 };
  // A finger that wants to scroll the page must not draw a zoom box.
  figure.layout.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
  Plotly.newPlot(plot, figure.data, figure.layout, {
    displayModeBar: false, // it would lie on the legend
    responsive: true,
  }).then(() => Plotly.relayout(plot, colours()));

  for (const control of Object.values(controls))
    control.addEventListener("change", () => {
      const chosen = choose(plot.data);
      Plotly.update(plot, chosen, { "xaxis.autorange": true, "yaxis.autorange": true });
    });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    Plotly.relayout(plot, colours()),
  );
})();
