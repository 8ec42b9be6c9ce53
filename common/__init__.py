"""What the scripts share. One idea per file; scripts import from here, never from each other."""
