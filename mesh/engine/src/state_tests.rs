//! The state on its way to another process: nothing lost, no nonce twice, garbage refused.

use std::collections::HashSet;

use crate::events::Queue;
use crate::noise::TYPE_DATA;
use crate::sim::{inner, number_in, Datagram, Net, Rng};
use crate::state::{load, save, Reader, Writer};

fn bytes_of(net: &Net, node: usize) -> Vec<u8> {
    let mut w = Writer::default();
    save(&net.nodes[node].core, &mut w);
    w.finish().to_vec()
}

fn quiet() -> Queue {
    Queue::new(Box::new(|| ()))
}

/// What a hand-over does to a node.
fn replace(net: &mut Net, node: usize) {
    net.nodes[node].pump(net.now);
    let b = bytes_of(net, node);
    let mut r = Reader::new(&b);
    let core = load(&mut r, net.now, quiet()).expect("what was written is read");
    r.end().expect("to the last byte");
    net.nodes[node].core = core;
}

fn numbers(net: &Net, node: usize) -> Vec<u32> {
    net.nodes[node].delivered.iter().map(|p| number_in(p)).collect()
}

fn counters(net: &Net) -> Vec<(std::net::SocketAddr, [u8; 4], u64)> {
    let data = net.log.iter().map(|(_, d)| d).filter(|d| d.bytes[0] == TYPE_DATA);
    data.map(|d: &Datagram| {
        (d.from, d.bytes[4..8].try_into().unwrap(), u64::from_le_bytes(d.bytes[8..16].try_into().unwrap()))
    })
    .collect()
}

#[test]
fn forty_hand_overs_lose_nothing_and_use_no_nonce_twice() {
    for cipher in ["chacha20poly1305", "aes-256-gcm"] {
        let mut net = Net::pair();
        for me in 0..2 {
            let other = net.nodes[1 - me].public;
            let (now, lines) = (
                net.now,
                format!(
                    "public_key={}\nretinue_cipher={cipher}\npersistent_keepalive_interval=3",
                    crate::sim::hex(&other)
                ),
            );
            net.nodes[me].set(now, &lines).unwrap();
        }
        let mut rng = Rng(7);
        let mut n = 0;
        for round in 0..40 {
            for _ in 0..rng.below(90) {
                net.nodes[0].send(net.now, &inner(0, n));
                net.nodes[1].send(net.now, &inner(1, n));
                n += 1;
            }
            // Some of them are still on the wire, in either direction.
            net.run(rng.below(3));
            replace(&mut net, round % 2);
            // Long enough that sessions are renewed on the way: some hand-overs meet a handshake.
            net.run(rng.below(20_000));
        }
        net.run(1000);
        let want: Vec<u32> = (0..n).collect();
        assert_eq!(numbers(&net, 0), want, "{cipher}");
        assert_eq!(numbers(&net, 1), want, "{cipher}");
        let used = counters(&net);
        let once: HashSet<_> = used.iter().collect();
        assert_eq!(once.len(), used.len(), "a nonce was used twice under one key");
        assert!(used.iter().map(|u| u.1).collect::<HashSet<_>>().len() > 6, "keys changed on the way");
    }
}

#[test]
fn replays_of_before_stay_replays() {
    let mut net = Net::pair();
    for i in 0..200 {
        net.nodes[0].send(net.now, &inner(0, i));
        net.run(5);
    }
    let seen = numbers(&net, 1).len();
    replace(&mut net, 1);
    let old: Vec<Datagram> =
        net.log.iter().map(|(_, d)| d.clone()).filter(|d| d.to == net.nodes[1].wire.from).collect();
    for d in old {
        net.nodes[1].receive(net.now, &[d]);
        net.nodes[1].pump(net.now);
    }
    assert_eq!(numbers(&net, 1).len(), seen);
}

#[test]
fn a_handshake_under_way_is_finished_by_the_other_process() {
    let mut net = Net::pair();
    net.nodes[0].send(net.now, &inner(0, 0));
    net.nodes[0].pump(net.now);
    // The initiation is out, the packet waits for the session.
    replace(&mut net, 0);
    net.run(100);
    assert_eq!(numbers(&net, 1), [0]);
    assert_eq!(net.log.iter().filter(|(_, d)| d.bytes[0] == 1).count(), 1, "no second initiation");
}

#[test]
fn what_is_written_is_what_is_written_again() {
    let mut net = Net::pair();
    for i in 0..70 {
        net.nodes[0].send(net.now, &inner(0, i));
        net.run(7);
    }
    let a = bytes_of(&net, 0);
    let core = load(&mut Reader::new(&a), net.now, quiet()).unwrap();
    let mut w = Writer::default();
    save(&core, &mut w);
    let b = w.finish();
    assert_eq!(a.len(), b.len());
    // Only the counter of the sending session moves, by the gap.
    assert!(a.iter().zip(b.iter()).filter(|(x, y)| x != y).count() <= 8);
}

#[test]
fn garbage_cuts_and_mutations_never_panic_and_cuts_are_refused() {
    let mut net = Net::pair();
    net.nodes[0].send(net.now, &inner(0, 1));
    net.run(50);
    let good = bytes_of(&net, 0);
    for end in 0..good.len() {
        assert!(load(&mut Reader::new(&good[..end]), net.now, quiet()).is_err(), "cut at {end}");
    }
    let mut rng = Rng(11);
    let mut refused = 0;
    for _ in 0..20_000 {
        let mut bad = good.clone();
        for _ in 0..=rng.below(4) {
            let at = rng.below(bad.len() as u64) as usize;
            match rng.below(3) {
                0 => bad[at] ^= 1 << rng.below(8),
                1 => bad[at] = rng.below(256) as u8,
                _ => bad.truncate(at.max(1)),
            }
        }
        let mut r = Reader::new(&bad);
        if let Ok(core) = load(&mut r, net.now, quiet()) {
            // Keys and numbers of other values are as good as any: whoever sends them may. They must be usable.
            let mut out = Vec::new();
            core.tick(crate::sim::at(net.now + 1), &mut out);
        } else {
            refused += 1;
        }
    }
    assert!(refused > 1000, "{refused}");
    for len in 0..300usize {
        let noise: Vec<u8> = (0..len).map(|_| rng.below(256) as u8).collect();
        let _ = load(&mut Reader::new(&noise), net.now, quiet());
    }
}
