package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	client, err := workloadapi.New(ctx)
	check(err)
	defer client.Close()
	x, err := client.FetchX509Context(ctx)
	check(err)
	fmt.Println("x509", x.DefaultSVID().ID, x.DefaultSVID().Hint, len(x.DefaultSVID().Certificates), x.Bundles.Len())
	token, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db"})
	check(err)
	fmt.Println("jwt", token.ID, token.Audience)
	bundles, err := client.FetchJWTBundles(ctx)
	check(err)
	parsed, err := jwtsvid.ParseAndValidate(token.Marshal(), bundles, []string{"db"})
	check(err)
	fmt.Println("validated here", parsed.ID)
	again, err := client.ValidateJWTSVID(ctx, token.Marshal(), "db")
	check(err)
	fmt.Println("validated there", again.ID)
	_, err = client.ValidateJWTSVID(ctx, token.Marshal(), "other")
	fmt.Println("other audience", err != nil)
	watch, stop := context.WithCancel(ctx)
	defer stop()
	w := &watcher{stop: stop}
	_ = client.WatchX509Context(watch, w)
	fmt.Println("watched", w.seen)
}

type watcher struct {
	seen int
	stop func()
}

func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	w.seen++
	fmt.Println("update", c.DefaultSVID().ID)
	if w.seen == 2 {
		w.stop()
	}
}
func (w *watcher) OnX509ContextWatchError(err error) {
	if w.seen < 2 {
		fmt.Println("watch error", err)
	}
}

func check(err error) {
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
}
