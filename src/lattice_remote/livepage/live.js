// Refreshes lattice's dashboard as soon as the board changes, in place of at its next look.
//
// The page looks every five seconds, with a function that it gives to setInterval. This script comes first, keeps that
// function, and calls it when an event tells of a change. When the events break, the page's own look goes on.
(function () {
  "use strict";
  var LOOK_MS = 5000, LEAST_GAP_MS = 200;
  var looks = new Map();
  var source = null, version = null, busy = false, again = false;

  var setInterval = window.setInterval.bind(window), clearInterval = window.clearInterval.bind(window);
  window.setInterval = function (look, ms) {
    var id = setInterval.apply(null, arguments);
    if (ms === LOOK_MS && typeof look === "function") looks.set(id, look);
    return id;
  };
  window.clearInterval = function (id) {
    looks.delete(id);
    clearInterval(id);
  };

  // One look at a time, and not more often than people can see; the last change is never missed.
  async function refresh() {
    if (busy) { again = true; return; }
    busy = true;
    try {
      await Promise.all(Array.from(looks.values(), function (look) { return look(); }));
      refreshTask();
    } catch (error) { /* the next look tries again */ }
    await new Promise(function (done) { window.setTimeout(done, LEAST_GAP_MS); });
    busy = false;
    if (again) { again = false; refresh(); }
  }

  // The page of a single task is not among the looks: it is shown anew, unless somebody is writing in it.
  function refreshTask() {
    if (!/^#\/task\//.test(location.hash)) return;
    var fields = document.querySelectorAll("textarea, input, select, [contenteditable=true]");
    var writing = Array.prototype.some.call(fields, function (field) {
      return field === document.activeElement || (field.tagName === "TEXTAREA" && field.value !== field.defaultValue);
    });
    if (!writing) window.dispatchEvent(new HashChangeEvent("hashchange"));
  }

  function show(trouble) {
    var bar = document.getElementById("remote-trouble");
    if (!trouble) { if (bar) bar.remove(); return; }
    if (!bar) {
      bar = document.createElement("div");
      bar.id = "remote-trouble";
      bar.setAttribute("role", "status");
      bar.style.cssText = "position:fixed;left:0;right:0;bottom:0;z-index:99999;padding:6px 12px;" +
        "font:13px sans-serif;background:#7a2e00;color:#fff;text-align:center";
      document.body.appendChild(bar);
    }
    bar.textContent = trouble;
  }

  // A hidden tab holds no connection: a browser has six for a host, and the page's own requests need them.
  function listen() {
    if (source || document.hidden || !window.EventSource) return;
    source = new EventSource("remote/events");
    source.onmessage = function (message) {
      var told = JSON.parse(message.data);
      show(told.trouble);
      if (version !== null && told.version !== version) refresh();
      version = told.version;
    };
  }
  document.addEventListener("visibilitychange", function () {
    if (document.hidden && source) { source.close(); source = null; }
    listen();
  });
  listen();
})();
