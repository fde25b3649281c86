//! The protocol core: peers, sessions, handshakes and timers. Sans I/O: it is handed bytes and
//! the time, and answers with [`Action`]s, so two cores can talk in a test without a socket.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use arc_swap::{ArcSwap, ArcSwapOption};
use zeroize::Zeroize;

use crate::cookie::{mac1_ok, Checker, RateLimiter, COOKIE_REPLY_LEN};
use crate::crypto::{random_u32, Key, SecretKey};
use crate::events::{Event, Queue};
use crate::noise::{
    read_initiation, tai64n, write_initiation, INITIATION_LEN, RESPONSE_LEN, TYPE_COOKIE, TYPE_INITIATION,
    TYPE_RESPONSE,
};
use crate::peer::{lock, Endpoint, Peer, Session};
use crate::router::Table;
use crate::timers::{
    jitter_ms, PeerTimers, Wheel, INITIATION_SPACING_MS, KEEPALIVE_MS, MAX_ATTEMPTS, REJECT_AFTER_MS,
    REKEY_AFTER_MESSAGES, REKEY_AFTER_MS, REKEY_TIMEOUT_MS, UNSET,
};

/// Time as the core sees it.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Milliseconds of a clock that never steps and counts suspended time; never 0.
    pub ms: u64,
    /// Wall clock since the epoch.
    pub wall_secs: u64,
    pub wall_nanos: u32,
}

/// A handshake message to put on the wire.
#[derive(Debug, Clone)]
pub struct Message {
    bytes: [u8; INITIATION_LEN],
    len: usize,
}

impl Message {
    fn new(b: &[u8]) -> Self {
        let mut bytes = [0; INITIATION_LEN];
        bytes[..b.len()].copy_from_slice(b);
        Self { bytes, len: b.len() }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// What the core wants done by whoever owns sockets.
pub enum Action {
    /// Send to the peer's endpoint.
    ToPeer(Arc<Peer>, Message),
    /// Send to where this peer's initiation came from.
    Answer(Arc<Peer>, Endpoint, Message),
    /// Send to an address that is not (yet) a peer's: a cookie reply.
    ToAddress(Endpoint, Message),
    /// Seal and send what waits for a session; nothing waiting: a keepalive when the flag is set.
    Flush(Arc<Peer>, bool),
}

/// The local key and everything derived from it.
pub struct Identity {
    pub secret: SecretKey,
    pub public: Key,
    pub(crate) checker: Checker,
}

impl Identity {
    pub fn new(secret: SecretKey) -> Self {
        let public = secret.public();
        Self { public, checker: Checker::new(&public), secret }
    }
}

/// State behind the control lock.
pub struct Control {
    pub identity: Option<Identity>,
    pub peers: HashMap<Key, Arc<Peer>>,
    limiter: RateLimiter,
    pub(crate) under_load_until: u64,
    pub(crate) wheel: Wheel<Arc<Peer>>,
}

/// Who a receiver index belongs to.
#[derive(Clone)]
pub enum Slot {
    Handshake(Arc<Peer>),
    Session(Arc<Session>),
}

/// Handshakes waiting above which every source must prove its address.
const LOAD_BACKLOG: usize = 128;
const LOAD_HOLD_MS: u64 = 1000;

pub struct Core {
    /// Snapshot of the allowed-IPs, swapped whole.
    pub routes: ArcSwap<Table<Arc<Peer>>>,
    pub control: Mutex<Control>,
    pub index: RwLock<HashMap<u32, Slot>>,
    pub queue: Queue,
    /// Key of mac1 in messages to us, so that workers drop what nobody meant for us: garbage takes
    /// no place in the queue and is no sign of load.
    pub mac1_key: ArcSwapOption<Key>,
    /// MTU of the TUN, for padding.
    pub mtu: AtomicUsize,
}

impl Core {
    pub fn new(now: u64, queue: Queue, mtu: usize) -> Self {
        Self {
            routes: ArcSwap::from_pointee(Table::default()),
            control: Mutex::new(Control {
                identity: None,
                peers: HashMap::new(),
                limiter: RateLimiter::default(),
                under_load_until: 0,
                wheel: Wheel::new(now),
            }),
            index: RwLock::new(HashMap::new()),
            queue,
            mac1_key: ArcSwapOption::empty(),
            mtu: AtomicUsize::new(mtu),
        }
    }

    /// Whether a handshake message has a length of its type and, but for a cookie reply, the right
    /// mac1. Called by the workers.
    pub fn plausible(&self, msg: &[u8]) -> bool {
        match (msg.first(), msg.len()) {
            (Some(&TYPE_COOKIE), COOKIE_REPLY_LEN) => true,
            (Some(&TYPE_INITIATION), INITIATION_LEN) | (Some(&TYPE_RESPONSE), RESPONSE_LEN) => {
                self.mac1_key.load().as_ref().is_some_and(|k| mac1_ok(k, msg))
            }
            _ => false,
        }
    }

    // ---- receiver indices -------------------------------------------------------------------

    /// The session of a receiver index; one read lock, taken once per batch.
    pub fn session(&self, index: u32) -> Option<Arc<Session>> {
        match self.index.read().unwrap_or_else(PoisonError::into_inner).get(&index) {
            Some(Slot::Session(s)) => Some(s.clone()),
            _ => None,
        }
    }

    pub(crate) fn slot(&self, index: u32) -> Option<Slot> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).get(&index).cloned()
    }

    fn new_index(&self, slot: Slot) -> u32 {
        let mut t = self.index.write().unwrap_or_else(PoisonError::into_inner);
        loop {
            let i = random_u32();
            if let std::collections::hash_map::Entry::Vacant(e) = t.entry(i) {
                e.insert(slot);
                return i;
            }
        }
    }

    pub(crate) fn set_slot(&self, index: u32, slot: Slot) {
        self.index.write().unwrap_or_else(PoisonError::into_inner).insert(index, slot);
    }

    fn free_index(&self, index: u32) {
        self.index.write().unwrap_or_else(PoisonError::into_inner).remove(&index);
    }

    fn drop_session(&self, s: Option<Arc<Session>>) {
        if let Some(s) = s {
            s.dead.store(true, Relaxed);
            self.free_index(s.local_index);
        }
    }

    // ---- sessions ---------------------------------------------------------------------------

    /// Wipes every session and any handshake under way; the next packet starts over.
    pub fn forget_sessions(&self, peer: &Arc<Peer>) {
        if let Some(p) = lock(&peer.handshake).pending.take() {
            self.free_index(p.local_index);
        }
        let mut k = lock(&peer.keys);
        peer.current.store(None);
        for s in [k.previous.take(), k.current.take(), k.next.take()] {
            self.drop_session(s);
        }
        peer.timers.initiated_at.store(UNSET, Relaxed);
    }

    /// A peer that left the configuration: keys gone, timers off, nothing staged.
    pub fn retire(&self, peer: &Arc<Peer>) {
        peer.dead.store(true, Relaxed);
        peer.timers.stop_all();
        self.forget_sessions(peer);
        lock(&peer.staged).take();
        // A wheel entry may keep the record for minutes: its secrets go now.
        let mut h = lock(&peer.handshake);
        h.psk.zeroize();
        h.static_static = None;
    }

    fn install(&self, peer: &Arc<Peer>, s: Arc<Session>) {
        let mut k = lock(&peer.keys);
        self.set_slot(s.local_index, Slot::Session(s.clone()));
        if s.initiator {
            let next = k.next.take();
            let current = k.current.take();
            let old = k.previous.take();
            if next.is_some() {
                k.previous = next;
                self.drop_session(current);
            } else {
                k.previous = current;
            }
            self.drop_session(old);
            peer.current.store(Some(s.clone()));
            k.current = Some(s);
        } else {
            let old = k.next.replace(s);
            let previous = k.previous.take();
            self.drop_session(old);
            self.drop_session(previous);
        }
    }

    /// First authenticated packet on a session we answered: it becomes the one to send with.
    pub fn confirm(&self, session: &Arc<Session>, now: Now) {
        let peer = &session.peer;
        {
            let mut k = lock(&peer.keys);
            if !k.next.as_ref().is_some_and(|n| Arc::ptr_eq(n, session)) {
                return;
            }
            session.confirmed.store(true, Relaxed);
            let old = k.previous.take();
            self.drop_session(old);
            k.previous = k.current.take();
            k.current = k.next.take();
            peer.current.store(k.current.clone());
        }
        self.handshake_complete(peer, now);
        self.queue.push(Event::Flush(peer.clone()));
    }

    // ---- timers -----------------------------------------------------------------------------

    /// Makes sure the wheel looks at `peer` at `at`.
    pub fn arm_timer(&self, peer: &Arc<Peer>, at: u64) {
        self.arm(peer, at);
    }

    fn arm(&self, peer: &Arc<Peer>, at: u64) {
        if peer.timers.arm(at) {
            self.queue.push(Event::Arm(peer.clone(), at));
        }
    }

    fn handshake_complete(&self, peer: &Arc<Peer>, now: Now) {
        let t = &peer.timers;
        t.retransmit_at.store(UNSET, Relaxed);
        t.attempts.store(0, Relaxed);
        t.late_rekey_sent.store(false, Relaxed);
        let nanos = now.wall_secs.saturating_mul(1_000_000_000) + u64::from(now.wall_nanos);
        peer.last_handshake.store(nanos, Relaxed);
    }

    fn session_derived(&self, peer: &Arc<Peer>, now: u64) {
        let at = now + 3 * REJECT_AFTER_MS;
        peer.timers.zero_at.store(at, Relaxed);
        self.arm(peer, at);
    }

    /// Some packet of ours that the peer can authenticate went out.
    #[inline]
    pub fn touch_sent(&self, session: &Arc<Session>, now: u64, data: bool) {
        let peer = &session.peer;
        let t = &peer.timers;
        if t.keepalive_at.load(Relaxed) != UNSET {
            t.keepalive_at.store(UNSET, Relaxed);
        }
        if let Some(at) = t.traversal(now) {
            self.arm(peer, at);
        }
        if data && t.silence_at.load(Relaxed) == UNSET {
            let at = now + KEEPALIVE_MS + REKEY_TIMEOUT_MS + jitter_ms();
            t.silence_at.store(at, Relaxed);
            self.arm(peer, at);
        }
        if session.sent() > REKEY_AFTER_MESSAGES || (session.initiator && session.age(now) > REKEY_AFTER_MS) {
            self.want_handshake(peer, now);
        }
    }

    /// An authenticated packet came in on `session`.
    #[inline]
    pub fn touch_received(&self, session: &Arc<Session>, now: u64, data: bool) {
        let peer = &session.peer;
        let t = &peer.timers;
        if t.silence_at.load(Relaxed) != UNSET {
            t.silence_at.store(UNSET, Relaxed);
        }
        if let Some(at) = t.traversal(now) {
            self.arm(peer, at);
        }
        if data {
            if t.keepalive_at.load(Relaxed) == UNSET {
                let at = now + KEEPALIVE_MS;
                t.keepalive_at.store(at, Relaxed);
                self.arm(peer, at);
            } else if !t.another_keepalive.load(Relaxed) {
                t.another_keepalive.store(true, Relaxed);
            }
        }
        let late = REJECT_AFTER_MS - KEEPALIVE_MS - REKEY_TIMEOUT_MS;
        if session.initiator && session.age(now) > late && !t.late_rekey_sent.swap(true, Relaxed) {
            self.want_handshake(peer, now);
        }
    }

    /// Asks the control side for a handshake, at most one request at a time.
    pub fn want_handshake(&self, peer: &Arc<Peer>, now: u64) {
        let t = &peer.timers;
        let last = t.initiated_at.load(Relaxed);
        if (last != UNSET && now.saturating_sub(last) < REKEY_TIMEOUT_MS)
            || peer.endpoint.load().is_none()
            || t.handshake_wanted.swap(true, Relaxed)
        {
            return;
        }
        self.queue.push(Event::NeedHandshake(peer.clone()));
    }

    /// When [`Core::tick`] must run next, in milliseconds of the device clock.
    pub fn next_tick(&self) -> Option<u64> {
        lock(&self.control).wheel.next_wake()
    }

    /// Runs all due timers.
    pub fn tick(&self, now: Now, out: &mut Vec<Action>) {
        let mut c = lock(&self.control);
        let mut due = Vec::new();
        c.wheel.expire(now.ms, &mut due);
        for (at, peer) in due {
            if !peer.dead.load(Relaxed) && peer.timers.fired(at) {
                self.run_timers(&mut c, &peer, now, out);
                if let Some(next) = peer.timers.next() {
                    if peer.timers.arm(next) {
                        c.wheel.insert(next, peer);
                    }
                }
            }
        }
    }

    fn run_timers(&self, c: &mut Control, peer: &Arc<Peer>, now: Now, out: &mut Vec<Action>) {
        let t = &peer.timers;
        if PeerTimers::take_due(&t.retransmit_at, now.ms) {
            if t.attempts.load(Relaxed) >= MAX_ATTEMPTS {
                lock(&peer.staged).take();
                if t.zero_at.load(Relaxed) == UNSET {
                    t.zero_at.store(now.ms + 3 * REJECT_AFTER_MS, Relaxed);
                }
            } else {
                t.attempts.fetch_add(1, Relaxed);
                peer.clear_source();
                self.initiate(c, peer, now, true, out);
            }
        }
        if PeerTimers::take_due(&t.keepalive_at, now.ms) {
            out.push(Action::Flush(peer.clone(), true));
            if t.another_keepalive.swap(false, Relaxed) {
                t.keepalive_at.store(now.ms + KEEPALIVE_MS, Relaxed);
            }
        }
        if PeerTimers::take_due(&t.silence_at, now.ms) {
            peer.clear_source();
            self.initiate(c, peer, now, false, out);
        }
        if PeerTimers::take_due(&t.zero_at, now.ms) {
            self.forget_sessions(peer);
        }
        if PeerTimers::take_due(&t.persistent_at, now.ms) && t.persistent_interval.load(Relaxed) > 0 {
            t.traversal(now.ms);
            out.push(Action::Flush(peer.clone(), true));
        }
    }

    // ---- handshakes -------------------------------------------------------------------------

    /// Starts or repeats a handshake with `peer`, at most every 5 s.
    fn initiate(&self, c: &mut Control, peer: &Arc<Peer>, now: Now, retry: bool, out: &mut Vec<Action>) {
        let t = &peer.timers;
        if !retry {
            t.attempts.store(0, Relaxed);
        }
        let last = t.initiated_at.load(Relaxed);
        if last != UNSET && now.ms.saturating_sub(last) < REKEY_TIMEOUT_MS {
            return;
        }
        if peer.endpoint.load().is_none() {
            return;
        }
        // Also when there is nothing to send: a key-less device must not be asked per packet.
        t.initiated_at.store(now.ms, Relaxed);
        let Some(me) = &c.identity else { return };
        let mut h = lock(&peer.handshake);
        if h.static_static.is_none() {
            h.static_static = me.secret.dh(&peer.public).ok();
        }
        let Some(ss) = h.static_static.clone() else { return };
        if let Some(old) = h.pending.take() {
            self.free_index(old.local_index);
        }
        let index = self.new_index(Slot::Handshake(peer.clone()));
        let stamp = tai64n(now.wall_secs, now.wall_nanos);
        let mut msg = [0u8; INITIATION_LEN];
        let e = SecretKey::random();
        match write_initiation(&me.public, &peer.public, &ss, e, &stamp, index, &mut msg) {
            Ok(pending) => h.pending = Some(Box::new(pending)),
            Err(_) => {
                self.free_index(index);
                return;
            }
        }
        h.cookies.add_macs(now.ms, &peer.public, &mut msg);
        let at = now.ms + REKEY_TIMEOUT_MS + jitter_ms();
        t.retransmit_at.store(at, Relaxed);
        self.arm(peer, at);
        if let Some(at) = t.traversal(now.ms) {
            self.arm(peer, at);
        }
        out.push(Action::ToPeer(peer.clone(), Message::new(&msg)));
    }

    /// Works off one queued event. `backlog`: handshake messages still waiting.
    pub fn handle(&self, event: Event, backlog: usize, now: Now, out: &mut Vec<Action>) {
        match event {
            Event::Arm(peer, at) => lock(&self.control).wheel.insert(at, peer),
            Event::NeedHandshake(peer) => {
                peer.timers.handshake_wanted.store(false, Relaxed);
                if !peer.dead.load(Relaxed) {
                    self.initiate(&mut lock(&self.control), &peer, now, false, out);
                }
            }
            Event::Flush(peer) => out.push(Action::Flush(peer, false)),
            Event::Handshake(h) => self.receive(&h.from, h.bytes(), backlog, now, out),
        }
    }

    fn receive(&self, from: &Endpoint, msg: &[u8], backlog: usize, now: Now, out: &mut Vec<Action>) {
        let mut c = lock(&self.control);
        let c = &mut *c;
        match (msg.first(), msg.len()) {
            (Some(&TYPE_COOKIE), COOKIE_REPLY_LEN) => self.receive_cookie(msg, now.ms),
            (Some(&TYPE_INITIATION), INITIATION_LEN) | (Some(&TYPE_RESPONSE), RESPONSE_LEN) => {
                if !self.admit(c, from, msg, backlog, now.ms, out) {
                    return;
                }
                if msg[0] == TYPE_INITIATION {
                    self.receive_initiation(c, from, msg.try_into().expect("length checked"), now, out);
                } else {
                    self.receive_response(c, from, msg.try_into().expect("length checked"), now, out);
                }
            }
            _ => {}
        }
    }

    /// mac1 always; under load mac2 (else a cookie reply) and the source's token bucket.
    fn admit(
        &self,
        c: &mut Control,
        from: &Endpoint,
        msg: &[u8],
        backlog: usize,
        now: u64,
        out: &mut Vec<Action>,
    ) -> bool {
        let Some(me) = &mut c.identity else { return false };
        if msg[1..4] != [0, 0, 0] || !me.checker.mac1_ok(msg) {
            return false;
        }
        if backlog >= LOAD_BACKLOG {
            c.under_load_until = now + LOAD_HOLD_MS;
        }
        if now >= c.under_load_until {
            return true;
        }
        if !me.checker.mac2_ok(now, msg, &from.addr) {
            let reply = me.checker.reply(now, msg, &from.addr);
            out.push(Action::ToAddress(*from, Message::new(&reply)));
            return false;
        }
        c.limiter.allow(now, from.addr.ip())
    }

    fn receive_cookie(&self, msg: &[u8], now: u64) {
        let msg: &[u8; COOKIE_REPLY_LEN] = msg.try_into().expect("length checked");
        let index = u32::from_le_bytes(msg[4..8].try_into().expect("fixed length"));
        let peer = match self.slot(index) {
            Some(Slot::Handshake(p)) => p,
            Some(Slot::Session(s)) => s.peer.clone(),
            None => return,
        };
        // A forged reply is dropped without a trace.
        let _ = lock(&peer.handshake).cookies.read_reply(now, &peer.public, msg);
    }

    fn receive_initiation(
        &self,
        c: &mut Control,
        from: &Endpoint,
        msg: &[u8; INITIATION_LEN],
        now: Now,
        out: &mut Vec<Action>,
    ) {
        let Some(me) = &c.identity else { return };
        let Ok(mut rx) = read_initiation(&me.secret, &me.public, msg) else { return };
        let Some(peer) = c.peers.get(&rx.peer).cloned() else { return };
        let mut h = lock(&peer.handshake);
        if h.static_static.is_none() {
            h.static_static = me.secret.dh(&peer.public).ok();
        }
        let Some(ss) = h.static_static.clone() else { return };
        let Ok(stamp) = rx.timestamp(&ss) else { return };
        if !h.stamps.fresh(&stamp, now.wall_secs) {
            return;
        }
        if h.last_initiation.is_some_and(|l| now.ms.saturating_sub(l) < INITIATION_SPACING_MS) {
            return;
        }
        let index = self.new_index(Slot::Handshake(peer.clone()));
        let remote = rx.remote_index;
        let mut reply = [0u8; RESPONSE_LEN];
        let made = rx.write_response(&h.psk, h.cipher, SecretKey::random(), index, &mut reply);
        let Ok(keys) = made else {
            self.free_index(index);
            return;
        };
        h.stamps.record(&stamp, now.wall_secs);
        h.last_initiation = Some(now.ms);
        h.cookies.add_macs(now.ms, &peer.public, &mut reply);
        drop(h);
        self.install(&peer, Session::new(peer.clone(), index, remote, keys, false, now.ms));
        peer.rx_bytes.fetch_add(INITIATION_LEN as u64, Relaxed);
        self.session_derived(&peer, now.ms);
        if let Some(at) = peer.timers.traversal(now.ms) {
            self.arm(&peer, at);
        }
        // Answered where it came from; roaming waits for a packet under the new keys. An initiation
        // recorded before a restart of ours would else turn the tunnel away from its peer.
        out.push(Action::Answer(peer, *from, Message::new(&reply)));
    }

    fn receive_response(
        &self,
        c: &mut Control,
        from: &Endpoint,
        msg: &[u8; RESPONSE_LEN],
        now: Now,
        out: &mut Vec<Action>,
    ) {
        let Some(me) = &c.identity else { return };
        let index = u32::from_le_bytes(msg[8..12].try_into().expect("fixed length"));
        let Some(Slot::Handshake(peer)) = self.slot(index) else { return };
        let mut h = lock(&peer.handshake);
        let Some(pending) = h.pending.as_ref().filter(|p| p.local_index == index) else { return };
        let Ok((keys, remote)) = pending.read_response(&me.secret, &h.psk, h.cipher, msg) else { return };
        h.pending = None;
        drop(h);
        self.install(&peer, Session::new(peer.clone(), index, remote, keys, true, now.ms));
        peer.rx_bytes.fetch_add(RESPONSE_LEN as u64, Relaxed);
        peer.seen_at(from);
        peer.timers.silence_at.store(UNSET, Relaxed);
        self.session_derived(&peer, now.ms);
        self.handshake_complete(&peer, now);
        // The first packet confirms the keys to the responder, so send one in any case.
        out.push(Action::Flush(peer, true));
    }
}
