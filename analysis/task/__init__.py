"""Which features of a transcoder do a task: ranked over prompts, kept a few at a time, left out one by one."""
