// Runs the page's handlers, renamed from onclick="..." to data-on-click="..." (livepage/__init__.py). Allowed are the
// installed page's own events, its functions with texts or the event as arguments, and four fixed statements. Any other
// attribute, such as an injected one, is ignored.
(function () {
  "use strict";
  var meta = document.querySelector('meta[name="remote-handlers"]');
  if (!meta) return;  // the policy allows the page's own handlers
  var events = meta.dataset.events.split(" "), calls = new Set(meta.dataset.calls.split(" "));
  var attributes = events.map(function (event) { return "[data-on-" + event + "]"; }).join();
  var STATEMENT = new RegExp(  // the same as in livepage/__init__.py
    "\\s*(?:location\\.hash\\s*=\\s*'([^'\\\\]*)'|(location\\.reload\\(\\))|(this\\.parentNode\\.remove\\(\\))" +
    "|(?:window\\.)?([A-Za-z_$][\\w$]*)\\(((?:\\s*(?:'[^'\\\\]*'|event)\\s*,?)*)\\))\\s*(?:;|$)", "y");
  var ARGUMENT = /'([^'\\]*)'|event/g;
  var heard = new WeakSet();

  // Parse the whole handler before running any of it.
  function steps(handler, element, event) {
    var found = [];
    STATEMENT.lastIndex = 0;
    while (STATEMENT.lastIndex < handler.length) {
      var part = STATEMENT.exec(handler);
      if (!part || (part[4] && !calls.has(part[4]))) return [];
      found.push(step(part, element, event));
    }
    return found;
  }

  function step(part, element, event) {
    if (part[1] !== undefined) return function () { location.hash = part[1]; };
    if (part[2]) return function () { location.reload(); };
    if (part[3]) return function () { element.parentNode.remove(); };
    var given = Array.from(part[5].matchAll(ARGUMENT), function (one) { return one[0] === "event" ? event : one[1]; });
    return function () { window[part[4]].apply(window, given); };
  }

  function listen(element) {
    if (heard.has(element)) return;
    heard.add(element);
    events.forEach(function (name) {
      if (!element.hasAttribute("data-on-" + name)) return;
      element.addEventListener(name, function (event) {
        steps(element.getAttribute("data-on-" + name) || "", element, event).forEach(function (run) { run(); });
      });
    });
  }

  new MutationObserver(function (changes) {
    changes.forEach(function (change) {
      change.addedNodes.forEach(function (node) {
        if (node.nodeType !== Node.ELEMENT_NODE) return;
        if (node.matches(attributes)) listen(node);
        node.querySelectorAll(attributes).forEach(listen);
      });
    });
  }).observe(document, { childList: true, subtree: true });
})();
