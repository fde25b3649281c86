/* A move, its fencing, the feed and a restore from backup: see README.md for what is abstracted.
 *
 * One identity instance, two hosts that may hold it (A, B), one receiver R, one control plane C. Every crash, loss,
 * delay and restart may happen at any moment, a bounded number of times. Bug variants are switched on with -D.
 */
#define A 1
#define B 2
#define NOBODY 0
#define EPOCHS 7            /* epochs 1..EPOCHS-1 */
#ifndef MOVES
#define MOVES 2
#endif
#ifndef CRASHES
#define CRASHES 1           /* of the receiver or of the control plane, together */
#endif

/* ---- the control plane: committed state (survives a crash) */
byte holder = A, epoch = 1, top = 1;
byte target = NOBODY, target_epoch = 0;
/* the high-water mark beside the database: the newest epoch that may have been told to anybody */
byte mark = 1;
/* a backup, and whether one was taken */
byte b_holder = A, b_top = 1;
bool backed_up = false, restored = false;

/* ---- ghost: what was ever signed active, owner by epoch, 0 for nobody */
byte owner[EPOCHS] = 0;

/* ---- the feed: one slot a subscriber, a newer position overwrites an older one (state transfer), or is lost */
typedef Told { byte holder, epoch; bool fresh; bool gone };
Told to_r;

/* ---- receiver: in force (volatile), on disk, and what it has reported as followed */
byte r_holder = NOBODY, r_epoch = 0;
byte r_disk_epoch = 0, r_disk_holder = NOBODY;
byte r_ack = 0;
bool r_up = true;
byte r_seen = 0;            /* ghost: the newest epoch R ever had in force */

/* ---- hosts: what each knows, and whether it believes to be the holder */
byte a_knows = 1, b_knows = 1;
bool a_holds = true, b_holds = false;

byte replays = 0, moves = 0, crashes = 0, backups = 0, withdrawals = 0;
bool withdrawn = false;     /* nobody holds it: the tombstone of the newest epoch */

inline sign(who, e) {
    assert(e < EPOCHS);
    /* one owner per epoch, also across a restore: no epoch is ever signed for two */
    assert(owner[e] == NOBODY || owner[e] == who);
    owner[e] = who
}

inline tell(slot) {
#ifdef BUG_NO_TOMBSTONE
#define MENTIONED !withdrawn
    if :: withdrawn -> skip :: else -> slot.fresh = true fi;  /* what is gone is not mentioned */
#else
#define MENTIONED true
    slot.fresh = true;
#endif
    slot.holder = holder; slot.epoch = epoch; slot.gone = withdrawn
}

inline publish() {
    /* the mark is written before anybody is told */
    if
    :: mark < top -> mark = top
    :: else
    fi;
    tell(to_r)
}

active proctype ControlPlane() {
    byte e, want;
    owner[1] = A;
    atomic { publish() };
end_idle:
    do
    /* PREPARE: a new epoch is used up */
    :: atomic { target == NOBODY && moves < MOVES && top < EPOCHS - 2 && !withdrawn ->
        moves++; top++; target = (holder == A -> B : A); target_epoch = top }
    /* COMMIT: compare-and-swap of (epoch, holder) */
#ifdef BUG_NO_CAS
    /* two movers read the same row, and both write what they had read */
    :: atomic { target != NOBODY -> e = target_epoch; want = target; target = NOBODY };
       if
       :: atomic { holder = want; epoch = e; sign(want, e); publish() };
          /* the second mover: its own idea of the target, the same epoch */
          atomic { want = (want == A -> B : A); holder = want; epoch = e; sign(want, e); publish() }
       :: skip
       fi
#else
    :: atomic { target != NOBODY ->
        holder = target; epoch = target_epoch; target = NOBODY; sign(holder, epoch); publish() }
#endif
    /* ABORT: nothing but the epoch is gone */
    :: atomic { target != NOBODY -> target = NOBODY }
    /* WITHDRAW: nobody holds it from here on, said by a record of its own */
    :: atomic { withdrawals < 1 && !withdrawn && target == NOBODY && top < EPOCHS - 2 ->
        withdrawals++; top++; epoch = top; withdrawn = true; sign(holder, epoch);
publish() }
    /* a lost frame is sent again on reconnect: state transfer */
    :: atomic { !to_r.fresh && r_epoch != epoch && MENTIONED -> tell(to_r) }
    /* backup; crash; restore of the backup */
    :: atomic { backups == 0 && target == NOBODY -> backups = 1; backed_up = true; b_holder = holder; b_top = top }
    :: atomic { crashes < CRASHES -> crashes++; target = NOBODY }
    :: atomic { backed_up && !restored && !withdrawn && mark + 2 < EPOCHS ->
        restored = true; target = NOBODY; 
        holder = b_holder;
#ifdef BUG_EPOCH_RESET
        top = b_top;                 /* counters as the backup has them */
#else
        top = mark;                  /* above whatever may have been given out */
#endif
        top++; epoch = top; sign(holder, epoch); publish() }
    od
}

/* A frame may be lost; and one that was sent long ago may be put in the way again, signature and all. */
active proctype Network() {
    Told old;
    bool kept = false;
end_idle:
    do
    :: atomic { to_r.fresh && crashes < CRASHES -> crashes++; to_r.fresh = false }
    :: atomic { to_r.fresh && !kept -> kept = true; old.holder = to_r.holder; old.epoch = to_r.epoch; old.gone = to_r.gone }
    :: atomic { kept && !to_r.fresh && replays < 1 -> replays++;
        to_r.holder = old.holder; to_r.epoch = old.epoch; to_r.gone = old.gone; to_r.fresh = true }
    od
}

/* In force from here on; it never goes back behind what was in force. */
inline act() {
    r_epoch = f.epoch; r_holder = (f.gone -> NOBODY : f.holder);
    assert(r_epoch >= r_seen); r_seen = r_epoch
}

/* What the receiver does with a record: check, persist, act, report; a crash may come between any two of them. */
active proctype Receiver() {
    Told f;
end_idle:
    do
    :: atomic { r_up && to_r.fresh ->
        f.holder = to_r.holder; f.epoch = to_r.epoch; f.gone = to_r.gone; to_r.fresh = false };
       if
#ifdef BUG_NO_RECEIVER_CHECK
       :: true ->
#else
       :: f.epoch > r_epoch || (f.epoch == r_epoch && f.holder == r_holder) ->
#endif
#ifdef BUG_ACK_BEFORE_PERSIST
          if :: atomic { r_up -> r_ack = f.epoch } :: !r_up -> skip fi;
#endif
#ifdef BUG_ACT_BEFORE_PERSIST
          if :: atomic { r_up -> act() } :: !r_up -> skip fi;
#endif
          if :: atomic { r_up -> r_disk_epoch = f.epoch; r_disk_holder = (f.gone -> NOBODY : f.holder) }
             :: !r_up -> skip fi;
          if :: atomic { r_up && r_disk_epoch == f.epoch -> act() } :: !r_up || r_disk_epoch != f.epoch -> skip fi;
          if :: atomic { r_up && r_disk_epoch == f.epoch -> r_ack = f.epoch } :: !r_up || r_disk_epoch != f.epoch -> skip fi
       :: else -> skip /* refused: what is in force stays */
       fi
    /* a restart begins from the disk alone, and never behind what was reported or in force */
    :: atomic { !r_up -> r_up = true; r_epoch = r_disk_epoch; r_holder = r_disk_holder;
        assert(r_epoch >= r_ack); assert(r_epoch >= r_seen) }
    od
}

active proctype Crash() {
end_idle:
    do
    :: atomic { r_up && crashes < CRASHES -> crashes++; r_up = false }
    od
}

/* The two hosts follow at any later time: however long one was paused or cut off. */
active proctype Hosts() {
end_idle:
    do
    :: atomic { a_knows != epoch -> a_knows = epoch; a_holds = (holder == A && !withdrawn) }
    :: atomic { b_knows != epoch -> b_knows = epoch; b_holds = (holder == B && !withdrawn) }
    od
}

/* ---- what must hold */
active proctype Monitor() {
end_idle:
    do
    /* at any moment: what is in force at the receiver was signed, so the old holder of a newer epoch is refused */
    :: atomic { r_holder != NOBODY && owner[r_epoch] != r_holder -> assert(false) }
    /* when nothing moves any more: the receiver has what the control plane says, also that nobody holds it */
    :: timeout -> assert(r_epoch == epoch && r_holder == (withdrawn -> NOBODY : holder));
       assert(a_holds == (holder == A && !withdrawn) && b_holds == (holder == B && !withdrawn)); break
    od
}
