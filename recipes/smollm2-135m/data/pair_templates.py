"""Question templates, names, number ranges and wordings for make_pairs.py; nothing to run.

A template is (question, steps, closed form). `{boxes:s}` in a question is a quantity `boxes` from the range `s`. The
steps become the Python code; the closed form is written down a second time, so that a slip in the steps cannot pass.
In LONG, the text after `#` says in words what the step computes.
"""

# d: a few, s: small, m: medium, l: large. No number is in two ranges, so held-out questions ask about new numbers.
TRAIN_RANGES = {"d": (2, 5), "s": (10, 19), "m": (30, 95), "l": (210, 900)}
HELDOUT_RANGES = {"d": (6, 9), "s": (20, 29), "m": (101, 199), "l": (1001, 4000)}
TRAIN_NAMES = "Mia Ben Lena Omar Ruth Ivan Tara Hugo Nina Paul Zoe Karl Asha Leo Vera Sam".split()
HELDOUT_NAMES = "Alice Peter Maria David Laura Simon Helen Frank".split()

INSTRUCTION = "Use Python and put the answer in \\boxed{}."
GUESSES = [
    "I can do this in my head. The answer is $\\boxed{%(answer)s}$.",
    "No code is needed here. The answer is $\\boxed{%(answer)s}$.",
    "By my estimate it is $\\boxed{%(answer)s}$.",
]
# What the assistant says in its first turn, in the turns between, and in its last turn.
SHORT_WORDS = (
    [""],
    [""],
    [f"{start} $\\boxed{{%(answer)s}}$." for start in ("The answer is", "Answer:", "This gives")],
)
LONG_WORDS = (
    ["First, I work out %(next)s.", "I start with %(next)s.", "Let me find %(next)s first."],
    ["So %(last)s is %(value)s. Now I need %(next)s.", "With %(last)s at %(value)s, I turn to %(next)s."],
    ["So %(last)s is %(answer)s. The answer is $\\boxed{%(answer)s}$.",
     "That was the last step: %(last)s is %(answer)s. The answer is $\\boxed{%(answer)s}$."],
)  # fmt: skip

SHORT = [
    ("{who} packs {boxes:s} boxes with {each:s} pencils each and gives away {gone:m} pencils. How many are left?",
     "total = boxes * each; left = total - gone", "boxes * each - gone"),
    ("{who} buys {books:s} books at {price:s} dollars each and a lamp for {lamp:m} dollars. What is the total cost?",
     "cost = books * price; total = cost + lamp", "lamp + price * books"),
    ("{who} walked {before:m} and {after:m} of {trip:l} km. How many km remain?",
     "walked = before + after; left = trip - walked", "trip - before - after"),
    ("{who} reads {pages:s} pages a day for {days:d} days. The book has {book:l} pages. How many are unread?",
     "read = pages * days; left = book - read", "book - days * pages"),
    ("{who} bakes {trays:s} trays of {rolls:s} rolls and fills bags of {size:d} rolls. How many bags is that?",
     "total = trays * rolls; bags = total // size", "trays * rolls / size"),
    ("{who} is {age:s} and {other} is {times:d} times as old. How old will {other} be in {years:s} years?",
     "now = age * times; later = now + years", "years + times * age"),
    ("A tank with {tank:l} liters loses {leak:s} liters an hour. How many liters are left after {hours:s} hours?",
     "lost = leak * hours; left = tank - lost", "tank - hours * leak"),
    ("{who} saves {save:m} dollars a month for {months:s} months and then spends {spent:l} dollars. How much remains?",
     "saved = save * months; left = saved - spent", "months * save - spent"),
    ("{who} cuts a {rope:l} cm rope into {parts:d} equal parts and glues {more:m} cm to one. How long is it in cm?",
     "part = rope // parts; length = part + more", "more + rope / parts"),
    ("A film lasts {hours:d} hours and {minutes:s} minutes. How many minutes is that?",
     "total = hours * 60 + minutes", "60 * hours + minutes"),
    ("A farm has {cows:m} cows and {hens:m} hens. How many legs do they have together?",
     "legs = cows * 4; total = legs + hens * 2", "2 * (2 * cows + hens)"),
    ("{who} earns {wage:s} dollars an hour and works {early:d} hours, then {late:d} hours. What is the pay?",
     "hours = early + late; pay = hours * wage", "early * wage + late * wage"),
    ("{who} puts {eggs:l} eggs into cartons of {size:s}. How many eggs are left over?",
     "left = eggs % size", "eggs - int(eggs / size) * size"),
    ("A garden is {length:m} m long and {width:s} m wide. How many meters of fence go around it?",
     "half = length + width; fence = half * 2", "2 * length + 2 * width"),
]  # fmt: skip

LONG = [
    ("{who} runs a small bakery. Every morning {trays:s} trays with {buns:s} buns each go into the oven. On each "
     "tray {burnt:d} buns come out too dark to sell. All the others are sold for {price:d} dollars each. How many "
     "dollars does the bakery take in each morning?",
     "good = buns - burnt # the number of good buns on a tray; total = trays * good # the number of buns sold; "
     "income = total * price # the income in dollars", "(trays * buns - trays * burnt) * price"),
    ("{who} and {other} drive to the coast, which is {trip:l} km away. They cover {speed:m} km an hour for {hours:d} "
     "hours and stop for lunch. After lunch they manage another {after:m} km before a tire goes flat. How many km are "
     "still ahead of them?",
     "morning = speed * hours # the distance before lunch; driven = morning + after # the distance covered so far; "
     "left = trip - driven # the distance still ahead", "trip - after - hours * speed"),
    ("A town library owns {shelves:s} shelves with {books:m} books each. Today {lent:l} of the books are on loan. "
     "{who} spreads the ones that are in evenly over {rooms:d} reading rooms. How many books does each room get?",
     "owned = shelves * books # the number of books owned; present = owned - lent # the number of books that are in; "
     "share = present // rooms # the number of books in a room", "(shelves * books - lent) / rooms"),
    ("{who} is {age:s} years old. {other} is {times:d} times as old, and their teacher is {more:s} years older than "
     "the two of them together. How old is the teacher?",
     "second = age * times # the age of {other}; both = age + second # the sum of their ages; "
     "teacher = both + more # the age of the teacher", "more + age * (1 + times)"),
    ("{who} wants to fence a garden that is {length:m} meters long and {width:s} meters wide. Fence costs {price:s} "
     "dollars a meter, and a voucher takes {off:m} dollars off the bill. How many dollars does the fence cost?",
     "half = length + width # half of the way around; cost = half * 2 * price # the price without the voucher; "
     "bill = cost - off # the bill in dollars", "price * 2 * length + price * 2 * width - off"),
    ("An orchard has {rows:s} rows with {trees:s} trees in each row. This year every tree gave {kilos:m} kilos of "
     "apples. {who} packs them into crates of {crate:d} kilos. How many crates are filled?",
     "count = rows * trees # the number of trees; harvest = count * kilos # the harvest in kilos; "
     "crates = harvest // crate # the number of crates", "rows * trees * kilos / crate"),
    ("In the first week {who} saves {start:s} dollars, in the second week twice that, in the third week three times "
     "that, and so on for {weeks:s} weeks. An aunt adds {gift:m} dollars. Then {who} buys a bicycle for {bike:l} "
     "dollars. How many dollars are left?",
     "saved = sum(start * week for week in range(1, weeks + 1)) # the amount saved; "
     "money = saved + gift # the amount with the gift; left = money - bike # the amount left",
     "start * weeks * (weeks + 1) / 2 + gift - bike"),
    ("{who} earns {wage:s} dollars an hour in a cafe. There are {days:d} shifts of {shift:s} hours this week "
     "and {extra:d} extra hours on Saturday. Then {tax:m} dollars of tax are taken off. How many dollars remain?",
     "hours = days * shift + extra # the number of hours; gross = hours * wage # the pay before tax; "
     "net = gross - tax # the pay after tax", "wage * extra + wage * shift * days - tax"),
    ("A workshop opens with a talk of {talk:m} minutes. After it, {groups:s} groups present one after the other. Each "
     "group speaks for {speech:s} minutes and needs {setup:d} minutes to set up. How many minutes does {who} spend "
     "there?",
     "slot = speech + setup # the time for one group; groups_time = groups * slot # the time for all groups; "
     "total = talk + groups_time # the time in minutes", "talk + groups * speech + groups * setup"),
    ("A coat used to cost {price:l} dollars and is now {cut:m} percent cheaper. {who} orders {coats:s} of these coats "
     "for a school play and pays {post:m} dollars for the delivery. How many dollars is the whole order?",
     "goods = price * coats # the old price of the coats; reduced = goods * (100 - cut) // 100 # their new price; "
     "bill = reduced + post # the price of the order", "post + coats * price * (100 - cut) / 100"),
    ("Two pumps fill a pool that holds {pool:l} liters. One gives {first:s} liters a minute and the other {second:s} "
     "liters a minute. {who} turns both off after {minutes:s} minutes. How many liters are still missing?",
     "rate = first + second # the flow of both pumps; filled = rate * minutes # the water in the pool; "
     "missing = pool - filled # the missing water in liters", "pool - first * minutes - second * minutes"),
    ("A school buys {packs:s} packs of {sheets:m} sheets of paper. {who} hands {give:m} sheets to each of {classes:d} "
     "classes and puts the rest into folders that take {size:s} sheets. How many sheets do not fill a folder?",
     "bought = packs * sheets # the number of sheets; rest = bought - classes * give # the number of sheets not handed "
     "out; over = rest % size # the number of loose sheets",
     "(packs * sheets - classes * give) - size * int((packs * sheets - classes * give) / size)"),
    ("{who} needs {kilos:s} kilos of nails. One shop asks {one:s} dollars a kilo and {fee:m} dollars for the delivery. "
     "Another shop asks {two:s} dollars a kilo and delivers for free. How many dollars more does the first shop ask?",
     "goods = kilos * one # the price of the nails; first = goods + fee # the first offer; "
     "more = first - kilos * two # the difference", "fee + kilos * (one - two)"),
]  # fmt: skip

HELDOUT = [
    ("A theater has {rows:s} rows of {chairs:s} chairs and {sold:m} tickets are sold. How many chairs stay free?",
     "places = rows * chairs; free = places - sold", "rows * chairs - sold"),
    ("{who} runs {laps:s} laps of {track:m} meters and walks another {walk:m} meters. How many meters is that?",
     "run = laps * track; total = run + walk", "walk + track * laps"),
    ("A printer makes {rate:s} copies a minute. It runs {first:s} minutes, then {second:s} more. How many copies?",
     "minutes = first + second; copies = minutes * rate", "rate * first + rate * second"),
    ("{who} shares {coins:l} coins equally among {jars:d} jars and adds {more:m} to one. How many are in that jar?",
     "share = coins // jars; full = share + more", "more + coins / jars"),
    ("There are {cars:m} cars in a garage. {gone:s} drive away and {come:s} arrive. How many cars are there now?",
     "stay = cars - gone; now = stay + come", "cars + come - gone"),
    ("{who} has {bag:l} g of flour and bakes {cakes:d} cakes with {flour:m} g each. How many g of flour remain?",
     "used = cakes * flour; rest = bag - used", "bag - flour * cakes"),
    ("A ribbon of {ribbon:l} mm is cut into pieces of {piece:s} mm. How many mm are left over?",
     "rest = ribbon % piece", "ribbon - int(ribbon / piece) * piece"),
    ("{who} grows {beds:s} beds of {tulips:s} tulips and ties bunches of {bunch:d}. How many bunches is that?",
     "flowers = beds * tulips; bunches = flowers // bunch", "beds * tulips / bunch"),
    ("A play has {acts:d} acts of {act:s} minutes and {pause:s} minutes of breaks. How many minutes does it last?",
     "playing = acts * act; total = playing + pause", "pause + act * acts"),
    ("{who} scores {first:m} points, then {second:m}, and loses {lost:s} points. What is the final score?",
     "scored = first + second; final = scored - lost", "first - lost + second"),
    ("A phone costs {phone:l} dollars. {who} pays {rate:s} dollars a week for {weeks:s} weeks. How much is still owed?",
     "paid = rate * weeks; owed = phone - paid", "phone - weeks * rate"),
    ("An empty box weighs {box:m} g. {who} puts {cups:s} cups of {cup:m} g each inside. How many g is that now?",
     "content = cups * cup; total = box + content", "cup * cups + box"),
]  # fmt: skip
