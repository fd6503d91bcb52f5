"""One project, seen from the network.

project      its queue and its worker
job          one request on its way
held         all of them, by id, within the bounds
bounds       what these are
outstanding  those that the worker has, and for how long the oldest
turns        whose request is next
waiting      who waits for a resource
writer       the worker process, seen from here
history      the head, the tree at the head, the followers
recent       the newest changes in memory
peer         one connected client
continuing   from which change a client may go on
skew         what an older client is told in place of what it does not know
pushes       whole projects that clients bring
files        files of the tree, sent at a number
texts        plans and notes as they are at the head
snapshot     a file as it was when it was opened
log          who did what, read back
overview     projects at a glance: counts, and who did something last
hooks        config.json's hooks, after the commit
watch        edits behind the server's back
"""
