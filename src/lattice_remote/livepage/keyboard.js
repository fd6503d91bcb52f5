// Tabs, cards and rows in reach of the keyboard. Tab reaches each tab, then one card or row; arrow keys move from there;
// Enter opens.
(function () {
  "use strict";
  var TABS = ".nav-tab, .nav-brand", ITEMS = ".card[data-task-id], #list-table tbody tr";
  var KEYS = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
  var last = "", holds = false;  // the task that had the focus last, and whether it has

  function keyOf(item) { return item.dataset.taskId || (item.querySelector("[title]") || item).title; }
  function reachable(item) {
    document.querySelectorAll(".remote-reachable").forEach(function (other) {
      if (other === item) return;
      other.classList.remove("remote-reachable");
      other.tabIndex = -1;
    });
    item.classList.add("remote-reachable");
    item.tabIndex = 0;
  }
  function column(item) { return item.closest(".board-col, tbody"); }
  function itemsOf(place) { return place ? Array.from(place.querySelectorAll(ITEMS)) : []; }

  // The item next to another: in its column, or in the nearest column that has any, at the same height.
  function next(item, across, down) {
    var items = itemsOf(column(item)), at = items.indexOf(item);
    if (down) return items[at + down];
    var place = column(item);
    do { place = across < 0 ? place.previousElementSibling : place.nextElementSibling; }
    while (place && !place.querySelector(ITEMS));
    items = itemsOf(place);
    return items[Math.min(at, items.length - 1)];
  }

  document.addEventListener("keydown", function (event) {
    var on = event.target;
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || !on.matches) return;
    var isItem = on.matches(ITEMS);
    if ((event.key === "Enter" || event.key === " ") && (isItem || on.matches(TABS))) {
      event.preventDefault();
      on.click();
    } else if (isItem && KEYS[event.key]) {
      var found = next(on, KEYS[event.key][0], KEYS[event.key][1]);
      event.preventDefault();
      if (found) { reachable(found); found.focus(); }
    }
  });
  document.addEventListener("focusin", function (event) {
    holds = event.target.matches(ITEMS);
    if (!holds) return;
    last = keyOf(event.target);
    reachable(event.target);
  });
  document.addEventListener("pointerdown", function () { holds = false; }, true);

  // A view was drawn: make one of its items reachable, and return the focus to the task that had it.
  function drawn(app) {
    if (app.querySelector(".remote-reachable")) return;
    var known = last && (app.querySelector('.card[data-task-id="' + CSS.escape(last) + '"]') ||
                         (app.querySelector('td[title="' + CSS.escape(last) + '"]') || app).closest("tbody tr"));
    var item = known || app.querySelector(ITEMS);
    if (!item) return;
    reachable(item);
    if (known && holds && document.activeElement === document.body) known.focus({ preventScroll: true });
  }
  document.addEventListener("DOMContentLoaded", function () {
    document.querySelectorAll(TABS).forEach(function (tab) {
      tab.tabIndex = 0;
      tab.setAttribute("role", "link");
    });
    var app = document.getElementById("app");
    if (app) new MutationObserver(function () { drawn(app); }).observe(app, { childList: true, subtree: true });
  });
})();
