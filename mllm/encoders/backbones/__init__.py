"""Which research backbones are written here from their papers, one file per family?"""
