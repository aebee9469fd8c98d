"""Router, log, recorder and trainer in one process, with a clock, dice and faults that a seed decides."""
