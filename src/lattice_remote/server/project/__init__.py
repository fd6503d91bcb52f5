"""One project in the network process: its queue, history, connections and files."""
