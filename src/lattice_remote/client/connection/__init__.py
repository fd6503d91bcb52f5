"""WebSocket connections of a client: dialling, requests, reconnects, uploads."""
