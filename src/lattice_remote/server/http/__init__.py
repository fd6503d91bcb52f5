"""HTTP: REST, events, the dashboard, sign-in pages."""
