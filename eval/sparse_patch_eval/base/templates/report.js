"use strict";
// Sorting and filtering of tables. Without it the page shows the same, unsorted.
(() => {
  const value = (row, column) => row.cells[column].dataset.sort ?? "";

  const compare = (a, b) => {
    // Cells without a value stay at the end, whatever the direction.
    if (a === "" || b === "") return (a === "") - (b === "");
    const x = Number(a), y = Number(b);
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  };

  const sortBy = (table, column) => {
    const head = table.tHead.rows[0].cells[column];
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => {
      const x = value(a, column), y = value(b, column);
      return x === "" || y === "" || up ? compare(x, y) : compare(y, x);
    });
    table.tBodies[0].append(...rows);
  };

  const filter = (table, selects) => {
    for (const row of table.tBodies[0].rows) {
      row.hidden = selects.some(
        (select) => select.value !== "" &&
          select.value !== `=${value(row, Number(select.dataset.column))}`);
    }
  };

  for (const table of document.querySelectorAll("table[data-sortable]")) {
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...cell.childNodes);
      button.addEventListener("click", () => sortBy(table, column));
      cell.append(button);
    });
    const columns = (table.dataset.filters || "").split(" ").filter(Boolean).map(Number);
    const bar = document.createElement("div");
    bar.className = "filters";
    const selects = [];
    for (const column of columns) {
      const names = new Map();
      for (const row of table.tBodies[0].rows) {
        names.set(`=${value(row, column)}`, row.cells[column].firstChild.textContent.trim());
      }
      if (names.size < 2) continue;
      const select = document.createElement("select");
      const name = table.tHead.rows[0].cells[column].textContent.trim();
      select.setAttribute("aria-label", name);
      select.dataset.column = column;
      select.append(new Option(`${name}: all`, ""));
      for (const [key, text] of names) select.append(new Option(text, key));
      select.addEventListener("change", () => filter(table, selects));
      selects.push(select);
      bar.append(select);
    }
    if (selects.length) table.parentElement.before(bar);
  }
  document.documentElement.classList.add("js");
})();
