// Redraws lattice's dashboard after a change instead of at its next poll, without disturbing the user's input.
//
// The page polls every five seconds with a function that it passes to setInterval. This script runs first, intercepts
// that function, and calls it after a change. Without an event stream the page's own polling continues.
(function (remote) {
  "use strict";
  var LOOK_MS = 5000, LEAST_GAP_MS = 200, BUSY_MS = 100, PRESSED_MS = 300, SETTLED_MS = 2000, DRAWN_MS = 50, FAILED_MS = 1500;
  var SAID_MS = 1000;  // show "waiting" after this time
  var looks = new Map();
  var missed = false, refreshing = false, drawing = false, waiting = false, within = null;
  var failed = false;  // whether a request of the poll failed

  var setInterval = window.setInterval.bind(window), clearInterval = window.clearInterval.bind(window);
  window.setInterval = function (look, ms) {
    if (ms !== LOOK_MS || typeof look !== "function") return setInterval.apply(null, arguments);
    var id = setInterval(function () { if (remote.hasLost() && !drawing && !isBusy()) draw(look); }, ms);
    looks.set(id, look);
    return id;
  };
  window.clearInterval = function (id) {
    looks.delete(id);
    clearInterval(id);
  };
  function pause(ms) { return new Promise(function (done) { window.setTimeout(done, ms); }); }

  // --- user input ---

  // Dragging a card, or typing. A field with an id in a view is a filter: its value is restored.
  var PLACES = "#app, #detail-panel, #web-detail-pane";
  var isDragging = false, pressed = 0, chosen = null;
  function isTask() { return /^#\/task\//.test(location.hash); }
  function isFilter(field) { return field.id && !isTask() && field.tagName !== "TEXTAREA" && field.closest("#app"); }
  function isWriting(field) {
    if (field.disabled || isFilter(field)) return false;
    if (field.tagName === "TEXTAREA" && field.value !== field.defaultValue) return true;
    if (field.closest(".inline-edit")) return true;
    return field === document.activeElement && field !== chosen;
  }
  function isBusy() {
    if (isDragging || Date.now() - pressed < PRESSED_MS) return true;
    var fields = document.querySelectorAll("textarea, input, select, [contenteditable=true]");
    return Array.prototype.some.call(fields, function (field) {
      return field.closest(PLACES) && field.offsetParent !== null && isWriting(field);
    });
  }
  document.addEventListener("dragstart", function () { isDragging = true; }, true);
  ["drop", "dragend", "pointerdown"].forEach(function (name) {
    document.addEventListener(name, function () { isDragging = false; }, true);
  });
  document.addEventListener("pointerdown", function () { pressed = Date.now(); }, true);  // its result is not known yet
  document.addEventListener("change", function (event) { chosen = event.target; }, true);  // a selection is finished
  ["pointerdown", "keydown", "focusin"].forEach(function (name) {
    document.addEventListener(name, function () { chosen = null; }, true);
  });

  // --- schedule ---

  // One poll at a time, with a minimum gap; the last change is never missed. A hidden page polls when it is shown again.
  async function refresh() {
    missed = true;
    if (document.hidden || refreshing) return;
    refreshing = true;
    while (missed && !document.hidden && !isBusy()) {
      failed = false;
      missed = late && !isTask();  // a visit draws from the page’s memory, perhaps without the change
      var look = isTask() || late ? revisit : lookEverywhere;
      late = false;
      await draw(look);
      await pause(failed ? FAILED_MS : LEAST_GAP_MS);
      missed = missed || (failed && remote.isLive());
    }
    refreshing = false;
    if (missed && !document.hidden) waitUntilIdle();
  }
  remote.refresh = refresh;
  async function waitUntilIdle() {
    if (waiting) return;
    waiting = true;
    for (var since = Date.now(); isBusy();) {
      if (Date.now() - since > SAID_MS) remote.tell("waiting", true);
      await pause(BUSY_MS);
    }
    waiting = false;
    remote.tell("waiting", false);
    refresh();
  }
  // The page ignores a failed poll, because it polls again soon. Here the next poll would be at the next change.
  remote.on("answer", function (status) {
    if (drawing && (status === 0 || status === 429 || status >= 500)) failed = true;
  });
  function lookEverywhere() { return Promise.all(Array.from(looks.values(), function (look) { return look(); })); }
  document.addEventListener("visibilitychange", function () {
    if (!document.hidden && missed) window.setTimeout(refresh, 0);  // after the page has resumed polling
  });

  // The page draws a view when its responses arrive, even if another view was chosen since: then redraw that.
  var visit = 0, late = false;
  function drawAgain() {
    late = true;
    refresh();
  }
  var DRAWN = { task: ".detail", stats: ".stats-view", activity: ".activity-filters" };
  function isOvertaken() {
    var view = location.hash.replace("#", "").split("/").filter(Boolean)[0] || "board";  // as the page reads it
    return Object.keys(DRAWN).some(function (name) { return name !== view && document.querySelector("#app " + DRAWN[name]); }) ||
           (view === "board" && !document.querySelector("#app .board-wrapper, #app .empty, #app .loading"));
  }
  function checkOvertaken() {
    if (drawing) window.setTimeout(checkOvertaken, DRAWN_MS);  // a poll without a change does not draw the view again
    else if (isOvertaken()) drawAgain();
  }
  remote.on("drawn", function () { window.setTimeout(checkOvertaken, 0); });
  window.addEventListener("hashchange", function (event) {
    if (!event.isTrusted) return;
    visit += 1;
    if (!isTask()) refresh();  // a task's page is requested on navigation
  });
  remote.guards.push(function (asked) {
    var begun = visit;
    function answered() {
      if (begun === visit) return;
      window.setTimeout(drawAgain, DRAWN_MS);
    }
    if (within !== lookEverywhere) asked.then(answered, answered);  // a poll knows its view
    return asked;
  });

  // If the user starts typing between a poll's request and its response, discard the response.
  remote.guards.push(function (asked) {
    if (!within) return asked;
    return asked.then(function (answer) {
      if (!isBusy()) {
        panel = panel || openPanel();
        return answer;
      }
      refresh();
      throw new Error("the user is typing");
    });
  });

  // --- preserved state ---

  async function draw(look) {
    while (drawing) await pause(10);
    drawing = true;
    panel = openPanel();
    var place = isTask() ? document.getElementById("app") : panel;
    var restoreBoard = keepBoard(), restoreHeight = place && keepHeight(place), fields = filters();
    var curtain = place && hangCurtain(place);
    try {
      await looking(look);
      restore(fields);
      restoreBoard();
      if (panel && !panel.classList.contains("open")) reopen();
      if (place && await settled(place)) restoreHeight();
    } catch (error) { /* the next look tries again */ } finally {
      if (curtain) curtain.remove();
      drawing = false;
    }
  }
  function looking(look) {
    within = look;
    try { return look(); } finally { within = null; }  // its requests are sent before it first waits
  }

  // A poll does not draw a task's page, so simulate navigation to it.
  function revisit() { window.dispatchEvent(new HashChangeEvent("hashchange")); }

  // A poll closes a task's panel beside the board, even one opened during the poll. Reopen it with the new content.
  var opened = "", panel = null;
  function openPanel() { return document.querySelector("#detail-panel.open"); }
  document.addEventListener("click", function (event) {
    var card = event.target.closest && event.target.closest(".card[data-task-id]");
    if (card) opened = card.dataset.taskId;
  }, true);
  function reopen() {
    var card = document.querySelector('.card[data-task-id="' + CSS.escape(opened) + '"]');
    if (card) card.click();
  }

  // A copy of the old content covers the page until the new content is complete.
  function hangCurtain(place) {
    var curtain = place.cloneNode(true), box = place.getBoundingClientRect();
    curtain.inert = true;
    [curtain].concat(Array.from(curtain.querySelectorAll("[id], [name]"))).forEach(function (part) {
      part.removeAttribute("id");
      part.removeAttribute("name");
    });
    curtain.className += " remote-curtain";
    curtain.style.left = box.left + "px";
    curtain.style.top = box.top + "px";
    curtain.style.width = box.width + "px";
    curtain.style.height = Math.max(box.height, window.innerHeight - box.top) + "px";
    document.body.appendChild(curtain);
    curtain.scrollTop = place.scrollTop;
    return curtain;
  }
  async function settled(place) {
    var wasEmpty = false;
    for (var end = Date.now() + SETTLED_MS; place.querySelector(".loading") && Date.now() < end;) {
      wasEmpty = true;
      await pause(10);
    }
    return wasEmpty;
  }

  // The board is replaced at once, so the window keeps its position; its inner scroll areas are recreated. A task's page
  // and a panel are empty for a moment.
  var boardLeft = 0;
  document.addEventListener("scroll", function (event) {
    if (event.target.matches && event.target.matches(".board-scroll")) boardLeft = event.target.scrollLeft;
  }, true);
  function keepBoard() {
    var before = document.querySelector(".board-scroll");
    return function () {
      var now = document.querySelector(".board-scroll");
      if (now && before && now !== before) now.scrollLeft = boardLeft;
    };
  }
  function keepHeight(place) {
    var element = place.id === "app" ? document.scrollingElement : place, top = element.scrollTop;
    return function () { element.scrollTop = top; };
  }

  function filters() {
    return Array.from(document.querySelectorAll("#app input[id], #app select[id]")).filter(isFilter).map(function (field) {
      var isText = field.tagName === "INPUT" && field.type === "text";
      return { field: field, isText: isText, isFocused: field === document.activeElement };
    });
  }
  function restore(kept) {
    kept.forEach(function (was) {
      var old = was.field, field = document.getElementById(old.id);
      if (!field || field === old) return;  // not redrawn
      if (was.isFocused) field.focus({ preventScroll: true });
      if (field.value !== old.value || field.checked !== old.checked) {
        field.value = old.value;
        field.checked = old.checked;
        ["input", "change"].forEach(function (name) { field.dispatchEvent(new Event(name, { bubbles: true })); });
      }
      if (was.isFocused && was.isText) field.setSelectionRange(old.selectionStart, old.selectionEnd);
    });
  }
})(window.latticeRemote);
