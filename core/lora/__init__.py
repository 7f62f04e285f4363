"""LoRAs: which matrices exist (`inventory.py`), who owns them (`loraid.py`), the trainable part (`adapter.py`), files
(`files.py`), several at once (`stack.py`), merging into a checkpoint (`merge.py`)."""
