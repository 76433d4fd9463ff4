"""Which kinds of stage are there besides supervised training? One room per kind."""
