"""The pages of our own, for people with a browser: signing in and out, the list of projects, and what went wrong.

    home         ``/``: the projects that somebody may see
    signing_in   ``/sign-in`` takes a token once and gives a cookie; ``/sign-out`` takes that back
    refusing     a refusal as a page, or as the way to sign in, where a browser asked for a page
    rendering    a template to an answer (``templates/``)
    assets       the style and the icon (``static/``)
    next_path    where somebody wanted to go, from whoever made the link

No script: all of it works as plain forms and links. Lattice's dashboard is not here; it is lattice's own.
"""
