"""How what feeds training is resumed in the middle of a pass, with the bits of the uninterrupted run."""
