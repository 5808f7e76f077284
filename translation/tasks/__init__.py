"""fairseq imports every file of this folder when it is given the folder above as ``--user-dir``."""
