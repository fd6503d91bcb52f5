"""Who may come in, and how bytes leave.

door         who may come in, and how much he may take
addresses    where a request comes from
bucket       how much at once, and in the long run
strangers    who has not shown a token yet
refusal      the answer to who is turned away
acceptor     connections, past the door
tls          the certificate
handoff      uvicorn's sockets, handed to websockets
outbox       what one client has still to be sent
"""
