"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, place) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[place].dataset.value ?? row.cells[place].textContent.trim();
    const order = (a, b) => {
      if (!key(a) || !key(b)) return !key(a) - !key(b);
      return (up ? 1 : -1) * key(a).localeCompare(key(b), "en", { numeric: true });
    };
    const byNumber = (a, b) => !key(a) || !key(b) ? order(a, b) : (up ? 1 : -1) * (key(a) - key(b));
    body.append(...[...body.rows].sort("numbers" in head.dataset ? byNumber : order));
  }));
}
const figures = document.getElementById("figures");
if (figures && window.Plotly) {
  const dragmode = matchMedia("(pointer: fine)").matches ? "zoom" : false;
  const all = Object.entries(JSON.parse(figures.textContent));
  for (const [id, { data, layout }] of all)
    Plotly.newPlot(id, data, { ...layout, dragmode }, { responsive: true, displayModeBar: false });
  const resize = (small, curve) => all.forEach(([id]) => Plotly.relayout(id, id === "curve" ? curve : small));
  addEventListener("beforeprint", () => resize({ width: 225, height: 190 }, { width: 640, height: 300 }));
  addEventListener("afterprint", () => resize(...Array(2).fill({ width: null, height: null, autosize: true })));
}
