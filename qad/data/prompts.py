"""Prompts and openings that a teacher answers or continues: templates filled with topics, many thousand combinations.

The student is trained on whatever the teacher says here, so the aim is breadth, not correctness: many registers, many
lengths, many formats, so that the KL to the teacher falls on text that no template resembles. All of it was written for
this file; nothing comes from an evaluation set.
"""

import random

_THINGS = """a lighthouse|the water cycle|honey bees|photosynthesis|a mechanical clock|glaciers|the printing press|sourdough bread
black holes|the human heart|coral reefs|electric cars|the Silk Road|volcanoes|vaccines|a suspension bridge|jazz|chess|the stock market
migration of birds|solar panels|the immune system|medieval castles|tea|compound interest|wolves|the moon|recycling|a steam engine
democracy|earthquakes|the Roman roads|chocolate|a refrigerator|mangrove forests|the violin|inflation|magnets|octopuses|a library
the internet|sleep|gravity|the Renaissance|wind turbines|penguins|fermentation|a compass|public transport|deserts|the brain|origami
rainbows|submarines|taxes|mushrooms|the alphabet|a marathon|antibiotics|cave paintings|lightning|a bicycle|the ozone layer|silk
neural networks|opera|soil erosion|a telescope|insurance|salt|the periodic table|a hospital|elephants|the tides|concrete|batteries
supply and demand|the guitar|rice farming|DNA|pottery|a city park|the French language|radio waves|dinosaurs|cloud computing|cheese""".replace(
    "\n", "|"
).split("|")

_PEOPLE = """a retired sailor|a young nurse|two sisters|an impatient baker|a lost traveler|a shy violin student|the last librarian in town
a night watchman|an old fisherman and his grandson|a robot who wants to paint|a detective afraid of the dark|a school bus driver
twin brothers|a clockmaker|an astronaut far from home|a stubborn goat farmer|a translator in a small embassy|a girl who collects maps
a chef without a sense of taste|the mayor of a tiny island|a gardener and a fox|a train conductor|an apprentice carpenter
a journalist who cannot lie|a mountain guide|a pair of rival poets|a letter carrier|a widow who repairs radios""".replace(
    "\n", "|"
).split("|")

_PLACES = """Lisbon|a fishing village in Norway|the Andes|Nairobi|a small town in Ohio|Kyoto|the coast of Scotland|Istanbul|a desert station
Vancouver|the old harbor of Genoa|a farm in Kansas|Hanoi|the outskirts of Prague|New Orleans|Cape Town|a monastery in Bhutan|Buenos Aires
the Black Forest|Marrakesh|a suburb of Melbourne|the banks of the Danube|Chicago|a port on the Baltic Sea|Mumbai|Reykjavik""".replace(
    "\n", "|"
).split("|")

_ACTIVITIES = """learn to swim as an adult|start a vegetable garden|prepare for a job interview|save money on groceries|train for a ten kilometer run
write a cover letter|fix a leaking tap|choose a laptop|plan a surprise party|study for a history exam|get over a cold|pack for a week of hiking
train a puppy|give a short speech|make new friends in a new city|cook dinner in twenty minutes|organize a small office|sleep better
teach a child to read|reduce screen time|negotiate a raise|clean a cast iron pan|paint a bedroom|learn a new language|set up a budget
take better photographs|write a short poem|repair a torn jacket|manage stress at work|host a book club|brew good coffee|learn to code""".replace(
    "\n", "|"
).split("|")

_EMAILS = """asking a landlord to repair the heating|thanking a teacher for her support|inviting colleagues to a farewell lunch|declining a wedding invitation
apologizing for a late delivery|requesting a refund for a broken lamp|introducing yourself to a new team|reminding a client about an unpaid invoice
asking a professor for an extension|announcing a change of office hours|recommending a former employee|reporting a lost suitcase to an airline
proposing a meeting about next year's budget|congratulating a friend on a new baby|complaining about noise from a building site
cancelling a gym membership|asking a neighbor to water the plants|offering to volunteer at an animal shelter""".replace(
    "\n", "|"
).split("|")

_CODE = """reverses a string|counts the vowels in a sentence|checks whether a number is prime|merges two sorted lists|finds the largest number in a list
computes the factorial of n|removes duplicates from a list|converts Celsius to Fahrenheit|counts word frequencies in a text|checks for palindromes
reads a CSV file and sums a column|returns the first n Fibonacci numbers|sorts a list of dictionaries by a key|validates an email address
flattens a nested list|finds the median of a list|implements a stack|performs a binary search|groups words by their first letter
computes the average of a list of numbers|draws a triangle of stars|simulates rolling two dice|rotates a matrix|parses a date""".replace(
    "\n", "|"
).split("|")

_PASSAGES = (
    "The ferry was late again. By the time it rounded the point, the market on the quay had closed and the bread was gone. "
    "Nobody complained; the storm in the night had torn three boats from their moorings, and the captain had stopped to tow one home.",
    "Our team tested the new pump for six weeks. It used nine percent less power than the old one, but it was louder, and two "
    "of the five seals had to be replaced. We suggest a second test with seals of a harder rubber before any are ordered.",
    "Many gardeners water in the evening. Water that stays on leaves overnight invites mildew, so the early morning is usually "
    "the better time. A deep soak twice a week helps roots grow downward, while a daily sprinkle keeps them near the surface.",
    "The town council voted on Tuesday to turn the old rail yard into a park. The plan includes a skating rink, a row of shops "
    "and a footbridge across the canal. Work is to begin in spring and will cost about four million, half of it paid by the state.",
    "When Ines opened her shop she sold only buttons. Customers came for buttons and asked for thread, so she sold thread. Then "
    "they asked for lessons. Ten years later the buttons are in a drawer at the back, and the school fills the whole building.",
    "Sound travels faster in water than in air, and faster still in steel. The stiffer a material is, the quicker a push on one "
    "particle reaches the next. That is why a person with an ear on the rail hears the train long before it can be seen.",
    "The museum's smallest room holds its strangest object: a map on which the sea is drawn in detail and the land left white. "
    "The sailor who made it had no use for roads. He marked every rock, every current, and the one tavern that gave him credit.",
    "A good meeting ends with a list. Write down who does what and by when, read it aloud, and send it within the hour. If the "
    "list is empty, the meeting was a conversation, which may be pleasant, but it should have been held over coffee.",
)

_SENTENCES = (
    "The results of the experiment were not what we expected.|I can't make it tonight because my car broke down.|Learning takes time."
    "|The old bridge will be closed for repairs until further notice.|She quickly finished her work and went home.|The food was okay."
    "|We are pleased to inform you that your application was successful.|He don't know where the keys is.|It rained all week long."
    "|The quick growth of the company surprised even its founders.|Please send me the report as soon as you can.|I like this town a lot."
    "|Their going to visit there friends over the weekend.|The movie was long, but the ending made up for it.|Prices rose again in May."
).split("|")

_STYLES = (
    "formal business English|a pirate's speech|simple words for a six year old|the style of a newspaper headline|a cheerful advertisement"
    "|the style of an old fairy tale|one short sentence|a polite question|a sports commentary|the passive voice|the past tense|a dramatic poem"
).split("|")

_SUMS = (
    "A shop sells {a} pencils on Monday and twice as many on Tuesday. How many does it sell in both days?",
    "{name} has {b} coins and gives {c} of them to each of two friends. How many coins are left?",
    "A train travels {a} kilometers in {c} hours. How far does it travel in one hour, if its speed does not change?",
    "A recipe for {c} people needs {a} grams of flour. How much flour is needed for {d} people?",
    "{name} reads {c} pages in the morning and {d} pages in the evening every day. How many pages is that in a week?",
    "What is {a} plus {b}, minus {c}? Show your work.",
    "A box holds {d} bottles. How many boxes are needed for {b} bottles?",
    "The price of a coat falls by {e} percent from {b} dollars. What is the new price?",
    "Is {a} divisible by {c}? Explain how you know.",
    "{name} earns {d} dollars an hour and works {c} hours a day, five days a week. How much is that in four weeks?",
)
_NAMES = "Mara|Tom|Aisha|Diego|Yuki|Elena|Kofi|Priya|Samuel|Ingrid|Omar|Chloe".split("|")

# Each template names the lists it draws from; the weights keep any one kind from crowding out the rest.
_INSTRUCTIONS: tuple[tuple[str, int], ...] = (
    ("Explain {thing} to a curious child.", 2),
    ("What is {thing}, and why does it matter?", 2),
    ("How does {thing} affect everyday life?", 1),
    ("Describe {thing} in exactly three sentences.", 1),
    ("Give me five interesting facts about {thing} as a numbered list.", 2),
    ("Write a short encyclopedia entry about {thing}.", 2),
    ("Compare {thing} with {thing2}. What do they have in common, and how do they differ?", 2),
    ("What are the advantages and disadvantages of {thing}?", 1),
    ("Tell me the history of {thing} in a few paragraphs.", 2),
    ("List three common misconceptions about {thing} and correct each one.", 1),
    ("Write a short story about {person} in {place}.", 3),
    ("Write the opening scene of a novel. It is set in {place}, and the main character is {person}.", 2),
    ("Write a dialogue between {person} and {person2} about {thing}.", 2),
    ("Write a poem about {thing}.", 1),
    ("Write a four line poem about {place}. Every line must end with an exclamation mark.", 1),
    ("Write an email {email}.", 3),
    ("Write a short, polite letter {email}. Do not use more than 80 words.", 1),
    ("How do I {activity}? Give me step-by-step instructions.", 3),
    ("I want to {activity}. What should I do first?", 2),
    ("Give me a checklist to {activity}. Use bullet points with bold headings.", 1),
    ("Write a blog post about how to {activity}. Start with a title in capital letters.", 1),
    ("Write a persuasive paragraph arguing that everyone should {activity}.", 1),
    ("Summarize the following text in one sentence.\n\n{passage}", 2),
    ("Summarize this passage in your own words:\n\n{passage}", 1),
    ("Read the text and answer: what is the main idea, and which details support it?\n\n{passage}", 1),
    ("Write three questions that a teacher could ask about this text, with answers.\n\n{passage}", 1),
    ("Continue this text with two more paragraphs.\n\n{passage}", 2),
    ("Rewrite this sentence in {style}: {sentence}", 2),
    ("Correct any mistakes in this sentence and explain what you changed: {sentence}", 1),
    ("Translate into Spanish, then into French: {sentence}", 1),
    ("Is the following sentence positive, negative or neutral? {sentence}", 1),
    ("Write a Python function that {code}.", 3),
    ("Write a Python program that {code}, and explain each step.", 2),
    ("How would you write a JavaScript function that {code}?", 1),
    ('Answer in JSON with the keys "topic", "summary" and "keywords": what is {thing}?', 1),
    ("Write about {thing} in all lowercase letters.", 1),
    (
        'Write a paragraph about {thing}. Mention the word "{word}" at least twice, and end with the words: That is all.',
        1,
    ),
    ("Name ten words that are related to {thing}, separated by commas.", 1),
    ("Plan a three day trip to {place}. Use a heading for each day.", 2),
    ("What would a day in the life of {person} look like?", 1),
    ("Write a product description for something that helps people {activity}.", 1),
    ("Write a news report about an unusual event in {place}.", 2),
    ("Give two arguments for and two against this statement: everyone should know how to {activity}.", 1),
    ("Make a table in markdown that compares {thing} and {thing2} on three points.", 1),
    ("{sum}", 5),
    ("Solve the problem step by step and give the answer at the end. {sum}", 4),
    ("Make up a word problem about {thing} and solve it.", 2),
    (
        "Three people stand in a line. {name} is not first. {name2} is directly behind {name}. Who can be first? Explain.",
        1,
    ),
    ("What is the next number: {c}, {d}, {a}? Explain your reasoning.", 1),
    ("Who would enjoy a visit to {place}, and why?", 1),
    ("Write a short biography of an imaginary scientist from {place} who studied {thing}.", 2),
    ("Hi! Can you help me to {activity}?", 1),
    ("What do you think about {thing}?", 1),
)

# Beginnings of plain documents. An empty one lets the teacher choose everything, which covers what no list does.
_OPENINGS: tuple[tuple[str, int], ...] = (
    ("", 8),
    ("{Thing} is", 3),
    ("{Thing} was first", 1),
    ("The history of {thing}", 2),
    ("In {place}, ", 2),
    ("{name} {surname} (born {year}) is", 2),
    ("{name} {surname} was a", 2),
    ("The {year} season", 1),
    ("The village of {surname} lies", 1),
    ("{surname} County is", 1),
    ("The Battle of {surname}", 1),
    ("Once upon a time, {person}", 2),
    ("It was raining when {person}", 2),
    ("{name} opened the door", 1),
    ('"I don\'t believe you," said {name}.', 2),
    ("The letter arrived on a {weekday}.", 1),
    ("{PLACE} - Officials said on {weekday}", 2),
    ("A new study of {thing} shows", 2),
    ("Shares of the company", 1),
    ("How to {activity}\n\n", 3),
    ("Chapter 1: {Thing}\n\n", 2),
    ("# {Thing}\n\n", 2),
    ("Question: {sum}\nAnswer:", 6),
    ("Problem. {sum}\n\nSolution.", 5),
    ("Q: What is {thing}?\nA:", 2),
    ("Dear {name},\n\n", 1),
    ("To: all staff\nSubject: {Thing}\n\n", 1),
    ("def ", 1),
    ("import ", 1),
    ("# This script {code}\n", 2),
    ("Abstract. We study", 1),
    ("In this essay, I will argue that", 1),
    ("Ingredients:\n", 1),
    ("When I was a child,", 2),
    ("Most people believe that {thing}", 1),
    ("There are several reasons why", 2),
    ("The main difference between {thing} and {thing2}", 2),
    ("According to", 1),
    ("During the {year}s,", 1),
    ("The", 3),
    ("He", 1),
    ("She", 1),
    ("We", 1),
    ("If", 1),
    ("{passage}\n\n", 4),
    ("{sentence}", 2),
    ("1. ", 1),
    ("Review: ", 1),
    ("Lesson objectives:\n", 1),
    ("Interviewer: How did you learn to {activity}?\n{name}:", 2),
)
_SURNAMES = "Harlow|Brandt|Okafor|Lindqvist|Moreau|Tanaka|Whitfield|Castellan|Novak|Abernathy|Delgado|Farrow|Sorensen|Mbeki".split(
    "|"
)
_WEEKDAYS = "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday".split("|")
_WORDS = "river|bright|system|careful|history|market|silver|balance|question|energy".split("|")


def _fill(template: str, draw: random.Random) -> str:
    """Return a template with its fields drawn from the lists."""
    thing, thing2 = draw.sample(_THINGS, 2)
    person, person2 = draw.sample(_PEOPLE, 2)
    name, name2 = draw.sample(_NAMES, 2)
    numbers = {"a": draw.randint(12, 96), "b": draw.randint(40, 400), "c": draw.randint(2, 6), "d": draw.randint(7, 18)}
    place = draw.choice(_PLACES)
    return template.format(
        thing=thing, thing2=thing2, Thing=thing[0].upper() + thing[1:], person=person, person2=person2, name=name,
        name2=name2, place=place, PLACE=place.upper(), activity=draw.choice(_ACTIVITIES), email=draw.choice(_EMAILS),
        code=draw.choice(_CODE), passage=draw.choice(_PASSAGES), sentence=draw.choice(_SENTENCES),
        style=draw.choice(_STYLES), word=draw.choice(_WORDS), surname=draw.choice(_SURNAMES), year=draw.randint(182, 201) * 10,
        weekday=draw.choice(_WEEKDAYS), sum=draw.choice(_SUMS).format(**numbers, e=draw.choice((5, 10, 20, 25)), name=name),
        **numbers,
    )  # fmt: skip


def _draw(templates: tuple[tuple[str, int], ...], count: int, seed: int, *, unique: bool) -> list[str]:
    """Return ``count`` filled templates: every template as often as its weight says, in shuffled order."""
    draw = random.Random(seed)
    round_of_templates = [template for template, weight in templates for _ in range(weight)]
    found: list[str] = []
    seen: set[str] = set()
    stale = 0
    while len(found) < count:
        for template in draw.sample(round_of_templates, len(round_of_templates)):
            text = _fill(template, draw)
            if unique and text in seen:
                stale += 1
                assert stale < 100 * len(round_of_templates) + 10 * count, "the templates are exhausted"
                continue
            seen.add(text)
            found.append(text)
    return found[:count]


def instruction_prompts(count: int, seed: int) -> list[str]:
    """Return that many distinct instructions of many kinds, the same ones for the same seed."""
    return _draw(_INSTRUCTIONS, count, seed, unique=True)


def text_openings(count: int, seed: int) -> list[str]:
    """Return that many beginnings of plain documents, some of them empty, the same ones for the same seed."""
    return _draw(_OPENINGS, count, seed + 1, unique=False)
