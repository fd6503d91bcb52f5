"""The connections of a cache.

links         all of one cache, and with which token each
stream        the changes as they arrive, for one who keeps no copy
link          one WebSocket that comes back after every cut
connecting    opens it: TLS, and what a failure means
pacing        when to try again
inbox         what has come and was not taken
outgoing      what can't be sent
"""
