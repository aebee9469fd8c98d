"""What happened: event contracts, the event log, the preference store, numbers and traces.

Imports none of the other packages; every other package may import this one.
"""
