"""Between people: verify a label set, publish it, fetch it, merge it with others, convert it."""
