"""The release controller: published version → offline gate → shadow → canary → stable, or back.

``machine`` and ``guards`` decide and are pure; ``store``, ``probes`` and ``controller`` read and write.
"""
