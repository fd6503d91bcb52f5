// Loads the page's libraries from other servers, and the scripts that need them, after the page has started. On a closed
// network the page works without them, and the views that need them name what is missing.
(function (remote) {
  "use strict";
  var NEED = /^#\/(cube|web)\b/;
  var missing = [], pending = 0, note = document.createElement("p");
  note.id = "remote-missing";
  note.setAttribute("role", "status");

  function load() {
    document.querySelectorAll("script[data-remote-src]").forEach(function (given) {
      var script = document.createElement("script"), address = given.dataset.remoteSrc;
      var isForeign = /^https:/.test(address);
      script.async = false;  // in the page's order
      script.src = address;
      pending += 1;
      if (isForeign) missing.push(address);
      script.onload = script.onerror = function (event) {
        pending -= 1;
        if (event.type === "load") missing = missing.filter(function (each) { return each !== address; });
        show();
        if (!pending && NEED.test(location.hash)) window.dispatchEvent(new HashChangeEvent("hashchange"));
      };
      document.head.appendChild(script);
    });
    show();
  }
  function show() {
    note.hidden = !missing.length || !NEED.test(location.hash);
    note.textContent = (pending ? "Loading the libraries of this view: " : "This view could not load: ") + missing.join(" ");
  }
  window.addEventListener("load", function () {
    document.body.appendChild(note);
    load();
  });
  window.addEventListener("hashchange", show);
})(window.latticeRemote);
