"""LoRAs: which matrices exist (`inventory.py`), who owns them (`loraid.py`), the trainable part (`adapter.py`, chosen by
`network.py`), files (`files.py`) and what they hold (`factors.py`), several at once (`stack.py`), merging into a
checkpoint (`merge.py`)."""
