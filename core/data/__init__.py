"""From a folder of clips to cached latents and text states.

`config.py` says what a data set is, `discovery.py` finds its files, `media.py` reads them, `buckets.py` chooses sizes,
`windows.py` chooses frames, `cache_files.py` names and checks cache files, `caching.py` makes them.
"""
