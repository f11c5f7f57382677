from counts import tally as tally
