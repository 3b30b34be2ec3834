"""One run or many on one stream: what a step does, what happens between steps, and how a killed run goes on."""
