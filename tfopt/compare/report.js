// Sorting and filtering of the table. Everything else on the page works without.
"use strict";

const table = document.querySelector("table");
const body = table.tBodies[0];
const search = document.querySelector("#search");
const statuses = [...document.querySelectorAll("input[name=status]")];
const count = document.querySelector("#count");

function sortBy(head) {
  const now = head.getAttribute("aria-sort");
  const next = now === "none" ? head.dataset.first : now === "ascending" ? "descending" : "ascending";
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", next);
  const index = head.cellIndex;
  const sign = next === "ascending" ? 1 : -1;
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [a.cells[index].dataset.value, b.cells[index].dataset.value];
    // What was not measured comes last, whichever way round.
    if (x === "" || y === "") return (x === "") - (y === "");
    const isNumber = head.dataset.kind === "number";
    return sign * (isNumber ? Number(x) - Number(y) : x.localeCompare(y));
  });
  body.append(...rows);
}

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = new Set(statuses.filter((box) => box.checked).map((box) => box.value));
  let shown = 0;
  for (const row of body.rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !wanted.has(row.dataset.status) || !words.every((word) => text.includes(word));
    shown += !row.hidden;
  }
  count.textContent = `${shown} of ${body.rows.length} variants`;
}

// A click in the plot must find its row, also when a filter hides it.
function reveal() {
  const row = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (row && row.hidden) {
    search.value = "";
    for (const box of statuses) box.checked = true;
    filter();
    row.scrollIntoView();
  }
}

for (const head of table.tHead.rows[0].cells) {
  head.querySelector("button").addEventListener("click", () => sortBy(head));
}
search.addEventListener("input", filter);
for (const box of statuses) box.addEventListener("change", filter);
window.addEventListener("hashchange", reveal);
document.querySelector(".controls").hidden = false;
filter();
