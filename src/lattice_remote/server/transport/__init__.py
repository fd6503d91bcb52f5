"""Sockets: the listener, admission control, WebSockets and send queues."""
