// Links of the hosted page: to the user's projects, and to signing in again.
(function (remote) {
  "use strict";
  remote.signIn = function () {
    return { href: "/sign-in?next=" + encodeURIComponent(location.pathname + location.hash), text: "Sign in" };
  };
  document.addEventListener("DOMContentLoaded", function () {
    var brand = document.querySelector(".nav-brand"), link = document.createElement("a");
    if (!brand) return;
    link.id = "remote-home";
    link.href = remote.url("../../../");
    link.textContent = "Projects";
    brand.before(link);
  });
})(window.latticeRemote);
