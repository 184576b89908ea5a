"use strict";
(() => {
  const specs = JSON.parse(document.getElementById("charts").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const select = document.getElementById("heat-measure");

  function colours() {
    const [ink, grid, back, lines] = dark.matches
      ? ["#e6e6ea", "#3d3d46", "#ff8a80", ["#7cc4ff", "#ffb454", "#6fdcae", "#ff9ecb", "#e8e06a", "#c3a6ff"]]
      : ["#1b1b1f", "#d9d9df", "#c22f3d", ["#0068b3", "#b35900", "#00795a", "#b0307a", "#6f6a00", "#6a3fc2"]];
    const words = { labelColor: ink, titleColor: ink };
    return {
      background: "transparent",
      axis: { ...words, gridColor: grid, domainColor: ink, tickColor: ink },
      legend: { ...words, symbolBaseFillColor: ink, symbolBaseStrokeColor: ink },
      line: { color: lines[0] },
      point: { color: lines[0], filled: true, opacity: 1 },
      style: { "rolled-back": { color: back, fill: back } },
      rule: { color: ink },
      text: { color: ink },
      range: { category: lines },
      view: { stroke: grid },
    };
  }

  // The expressions are interpreted (ast), not compiled: the page's policy forbids eval.
  function draw(figure) {
    const name = figure.dataset.chart === "heat" ? `heat-${select.value}` : figure.dataset.chart;
    return vegaEmbed(figure.querySelector(".plot"), specs[name], {
      mode: "vega-lite", ast: true, actions: false, renderer: "svg", config: colours(),
    }).catch((error) => console.error(error));
  }

  const figures = [...document.querySelectorAll("figure[data-chart]")];
  const drawAll = () => Promise.all(figures.map(draw)).then(() => {
    document.body.dataset.drawn = dark.matches ? "dark" : "light";
  });
  dark.addEventListener("change", drawAll);
  if (select) {
    select.addEventListener("change", () => figures.filter((f) => f.dataset.chart === "heat").forEach(draw));
  }
  drawAll();

  const words = document.getElementById("filter-words");
  if (!words) return;
  const verdict = document.getElementById("filter-verdict");
  const shown = document.getElementById("filter-shown");
  const rows = [...document.querySelectorAll("#decisions article")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  function filter() {
    const wanted = words.value.trim().toLowerCase();
    rows.forEach((row, i) => {
      row.hidden = !texts[i].includes(wanted) || (verdict.value && row.dataset.verdict !== verdict.value);
    });
    shown.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} steps shown`;
  }
  words.addEventListener("input", filter);
  verdict.addEventListener("change", filter);
  filter();
})();
