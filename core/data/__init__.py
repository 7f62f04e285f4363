"""From a folder of clips to cached latents and text states.

`config.py` says what a data set is, `discovery.py` finds its files, `media.py` reads them, `buckets.py` chooses sizes,
`windows.py` chooses frames, `planning.py` says which files that gives, `cache_files.py` names and checks them, `caching.py`
makes them; `statistics.py` and `preview.py` show what training will see.
"""
