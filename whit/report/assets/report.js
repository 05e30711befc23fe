"use strict";
// Sort a table by the column whose heading is pressed; press again to turn the order around.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.addEventListener("click", () => {
    const descending = heading.getAttribute("aria-sort") === "ascending";
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      const difference = Number(x) - Number(y);
      return Number.isNaN(difference) ? x.localeCompare(y, "en", {numeric: true}) : difference;
    };
    const rows = [...table.tBodies[0].rows].sort(order);
    table.tBodies[0].append(...(descending ? rows.reverse() : rows));
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
  }));
}
// Show what a heat-map cell stands for below the map, on hover and on touch.
for (const figure of document.querySelectorAll(".heat-figure")) {
  const readout = figure.querySelector(".readout");
  const show = (event) => {
    if (event.target.classList.contains("cell")) readout.textContent = event.target.title;
  };
  figure.addEventListener("mouseover", show);
  figure.addEventListener("click", show);
}
