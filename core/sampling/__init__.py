"""Sampling: schedules (`schedule.py`), solvers (`solvers.py`), guidance and its plan (`guidance.py`), decoding."""
