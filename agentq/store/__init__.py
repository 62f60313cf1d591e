"""All access to MongoDB: runs, audit, workflows, conversations.

``mongo.MongoStore`` serves production, ``memory.MemoryStore`` unit tests and simulation; one contract suite runs
against both.
"""
