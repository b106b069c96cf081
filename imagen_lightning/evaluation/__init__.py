"""What a cascade's pictures are worth, stage by stage, and where the pictures and numbers of an evaluation lie."""
