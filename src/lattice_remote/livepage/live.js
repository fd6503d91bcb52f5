// Refreshes lattice's dashboard as soon as the board changes, in place of at its next look.
//
// The page looks every five seconds, with a function that it gives to setInterval. This script comes first, keeps that
// function, and calls it when an event tells of a change. When the events break, the page's own look goes on.
(function () {
  "use strict";
  var LOOK_MS = 5000, LEAST_GAP_MS = 200;
  var looks = new Map();
  var last = null, missed = false, busy = false, again = false;

  var setInterval = window.setInterval.bind(window), clearInterval = window.clearInterval.bind(window);
  window.setInterval = function (look, ms) {
    if (ms !== LOOK_MS || typeof look !== "function") return setInterval.apply(null, arguments);
    var kept = function () { return isWriting() ? undefined : look(); };
    var id = setInterval(kept, ms);
    looks.set(id, kept);
    return id;
  };
  window.clearInterval = function (id) {
    looks.delete(id);
    clearInterval(id);
  };

  // One look at a time, and not more often than people can see; the last change is never missed. A hidden page does not
  // look: it does when it is shown again.
  async function refresh() {
    if (document.hidden) { missed = true; return; }
    if (busy) { again = true; return; }
    busy = true;
    try {
      if (!isTask()) await Promise.all(Array.from(looks.values(), function (look) { return look(); }));
      else if (!isWriting()) window.dispatchEvent(new HashChangeEvent("hashchange"));
    } catch (error) { /* the next look tries again */ }
    await new Promise(function (done) { window.setTimeout(done, LEAST_GAP_MS); });
    busy = false;
    if (again) { again = false; refresh(); }
  }
  document.addEventListener("visibilitychange", function () {
    if (document.hidden || !missed) return;
    missed = false;
    window.setTimeout(refresh, 0);  // when the page has begun to look again
  });

  // A look redraws the page of a single task with all that somebody is writing in it, or not at all. So it is shown anew
  // as if somebody had just come to it, and is left alone while somebody is writing.
  function isTask() { return /^#\/task\//.test(location.hash); }
  function isWriting() {
    var fields = isTask() ? document.querySelectorAll("textarea, input, select") : [];
    return Array.prototype.some.call(fields, function (field) {
      return field === document.activeElement || (field.tagName === "TEXTAREA" && field.value !== field.defaultValue);
    });
  }
  window.addEventListener("hashchange", function (event) { if (event.isTrusted) refresh(); });

  function show(trouble) {
    var bar = document.getElementById("remote-trouble");
    if (!trouble) { if (bar) bar.remove(); return; }
    if (!document.body) return;
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

  function take(text) {
    var told = JSON.parse(text);
    show(told.trouble);
    if (last === null || told.version !== last) refresh();
    last = told.version;
  }

  // One page listens for all pages of this browser: it has six connections for a host, and their requests need them.
  // When that page is closed, another takes its place. A page that is opened asks what was told last, with an empty text.
  function listen(pass) {
    var source = new EventSource("remote/events");
    source.onmessage = function (message) { take(message.data); pass(message.data); };
    source.onerror = function () {  // the browser tries again by itself, but not after every answer
      if (source.readyState === EventSource.CLOSED) window.setTimeout(listen, LOOK_MS, pass);
    };
  }
  if (!window.EventSource) return;
  if (!navigator.locks || !window.BroadcastChannel) { listen(function () {}); return; }
  var name = "remote-events " + new URL("remote/events", location.href);
  var channel = new BroadcastChannel(name), told = "";
  channel.onmessage = function (message) {
    if (message.data) take(message.data);
    else if (told) channel.postMessage(told);
  };
  channel.postMessage("");
  navigator.locks.request(name, function () {
    listen(function (text) { told = text; channel.postMessage(text); });
    return new Promise(function () {});  // kept for as long as the page is open
  });
})();
