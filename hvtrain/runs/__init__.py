"""`hvtrain runs`: what runs there are, how they stand, and their curves side by side. No torch here."""
