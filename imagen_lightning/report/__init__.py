"""Run folders and evaluations as one self-contained HTML page; `page` makes pages of other things too."""
